"""Forms of a model that are made for inference, and programs that are exported from one."""
