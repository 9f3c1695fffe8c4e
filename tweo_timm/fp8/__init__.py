"""FP8 training: one recipe, three backends, the same per-tensor scaling."""
