"""Text and image encoders, and how prompts become conditioning.

Start with conditioning.py: `Encode` turns resolved requests into a `ConditioningSchedule` (condition.py). clip.py,
t5.py and clip_vision.py are the networks, tokenizer.py reads CLIP's vocabulary, textual_inversion.py reads embedding
files. The encoders take networks and tokenizers, and never a loaded model or a registry.
"""
