"""The environment of programs: devices, processes, the terminal and the disk. Imports nothing else from segjax."""
