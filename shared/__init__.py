"""What both stages must agree on: the shard format, buckets, and the identity of a model.

The test for what may live here: would changing it make existing shards wrong or unreadable?
"""

import logging

__version__ = "0.1.0"

# accelerate imports DeepSpeed wherever it is installed, and that tells stdout which accelerator it
# found, between the lines (and the JSON) that are ours.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
# peft imports bitsandbytes wherever it is installed, and that warns of a matmul for CPUs that it
# lacks, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
