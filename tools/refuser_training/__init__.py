"""How the model that refuses is made: its language, its training, its file, and the check that ablation works on it."""
