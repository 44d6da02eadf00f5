"""The commands, one module each, which parses arguments, calls the library and prints. Nothing imports them."""
