"""Stage two: distil a LoRA from shards. No VAE, text encoder or image encoder is built here."""
