"""What papers do with OPT, a file each. The core knows none of them: each can be deleted with the rows that name it."""
