"""The commands, a module each: it parses arguments, calls the library and prints. Nothing imports them."""
