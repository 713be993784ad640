"""Stage one: media and captions become shards (`wanprep`)."""
