"""Small models that refuse, of several kinds: their language, their shapes, how they are trained and scored."""
