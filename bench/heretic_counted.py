"""Starts the published Heretic in its own environment, as its command does, counting what it decodes.

Runs there, so it knows nothing of this project. Writes the counts to the file $COUNTS names whenever they change much.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    from transformers import GenerationMixin

    counts = {"calls": 0, "tokens_decoded": 0, "tokens_prefilled": 0}
    plain, told = GenerationMixin.generate, [0.0]

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        found = plain(self, *args, **options)
        sequences = found if not hasattr(found, "sequences") else found.sequences
        prompt, pad = options["input_ids"], options.get("pad_token_id")
        counts["calls"] += 1
        counts["tokens_prefilled"] += int((prompt != pad).sum())
        counts["tokens_decoded"] += int((sequences[:, prompt.shape[1] :] != pad).sum())
        if time.monotonic() - told[0] > 0.5:
            told[0] = time.monotonic()
            Path(os.environ["COUNTS"]).write_text(json.dumps(counts))
        return found

    GenerationMixin.generate = counted
    sys.argv = ["heretic"]
    from heretic.main import main as heretic

    heretic()


if __name__ == "__main__":
    main()
