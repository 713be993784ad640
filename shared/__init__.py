"""What both stages must agree on: the shard format, buckets, and the identity of a model.

The test for what may live here: would changing it make existing shards wrong or unreadable?
"""

__version__ = "0.1.0"
