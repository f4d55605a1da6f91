"""Set before anything imports huggingface_hub, which reads it once: no test may reach out."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests of the hub start processes of their own
