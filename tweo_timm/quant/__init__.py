"""Post-training quantization with static scales."""
