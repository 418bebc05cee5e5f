"""The downstream tasks: what a fine-tuned model is for, and how well it does it."""
