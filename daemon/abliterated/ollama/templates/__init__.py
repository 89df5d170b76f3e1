"""What registration needs of chat templates. The work is done below, in `abliterated.templates`."""

from abliterated.templates.abilities import abilities
from abliterated.templates.go import go_template_for
from abliterated.templates.variants import Variant, tool_variant

__all__ = ["Variant", "abilities", "go_template_for", "tool_variant"]
