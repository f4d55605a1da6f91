"""What makes a loaded model fast, or runs a program that was made of one."""
