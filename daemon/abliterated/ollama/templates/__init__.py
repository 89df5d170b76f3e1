"""What registration needs of chat templates. The work is done below, in `abliterated.templates`."""

from abliterated.templates.abilities import abilities
from abliterated.templates.go import speaks_of_tools
from abliterated.templates.variants import Variant, tool_variant
from abliterated.templates.worker import go_template_for

__all__ = ["Variant", "abilities", "go_template_for", "speaks_of_tools", "tool_variant"]
