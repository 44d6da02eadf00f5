"""What programs run on: devices, processes, the terminal and the disk. Imports nothing of segjax."""
