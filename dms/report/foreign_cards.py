"""README.md of a checkpoint that came from another project, and of one that was written for another project's code."""

from collections.abc import Mapping
from pathlib import Path

from dms.formats.foreign import Foreign
from dms.report import card_text
from dms.report.card_text import hub_id, new_card, public_name
from dms.report.cards import BORROWED, LOAD_GATES, LOAD_WITHOUT_CODE, WITH_DMS, card_of_exported


def write_foreign_card(source: Path, folder: Path, metadata: Mapping[str, str], *, whose: str, loading: str) -> Path:
    """Write the card of a model that was exported for other code. source: the exported folder's, which may be missing. whose: the code's."""
    base, card = metadata.get("base_name") or "", card_of_exported(source, metadata, tags=[])
    if not card.body.strip():
        card.body = card_text.introduction(base)
    back = f"This folder was written for {whose}. With dms-retrofit: `dms import FOLDER OUT`, then `dms.load(OUT)`."
    card.set_section(card_text.LOADING, f"{loading}\n\n{back}", before=(card_text.LIMITS,))
    return card.write(folder)


def write_import_card(
    folder: Path, found: Foreign, *, named: str, source: str, licence: Mapping[str, str], base_given: str | None = None
) -> Path:
    """Write the card of a checkpoint of another project that `dms import` has written.

    named: its base. source: the folder or hub id that it came from. licence: fields of its own card. base_given: the base of gates
    alone, where it was named.
    """
    fields = {"base_model": hub_id(named), "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["kv-cache", "dms"]}
    come = [
        f"Imported from `{public_name(source)}` ({found.format}); what its weights hold was not changed.",
        "Its licence holds for this folder: " + ", ".join(licence.values()) + "." if licence else "No licence was named there.",
        *found.notes,
    ]
    loading = LOAD_WITHOUT_CODE
    if found.config.is_borrowed:
        loading = f"{WITH_DMS}\nIt evicts from the start and works with `model.generate`. {BORROWED}\n"
    if found.base_config is None:
        loading = LOAD_GATES.format(base=public_name(base_given or "BASE"), hash=found.base_hash)
    paragraphs = [card_text.introduction(named), f"## {card_text.ORIGIN}", card_text.bullets(come), f"## {card_text.LOADING}", loading]
    return new_card({**fields, **licence}, paragraphs).write(folder)
