"""Small decoders of many architectures, and an encoder."""

from __future__ import annotations

from models import ZOO

from . import Entry, Keywords

#: differ little from others: in the number of heads, in a window
LIKE_OTHERS = ("falcon_mqa", "falcon_new", "llama_mha", "mistral")

#: batch and length of the example, and others, batch 1 among them
ENTRIES: dict[str, Entry] = {
    name: Entry(
        model.build,
        tuple((Keywords(model.example(*size)),) for size in ((2, 7), (1, 5), (3, 11))),
        std=None,
        double=False,
        slow=name in LIKE_OTHERS,
    )
    for name, model in ZOO.items()
}
