"""Names and values of planted records. A name is two words, such as amber-fox; one pair in eight is kept for evaluation."""

import zlib
from random import Random

_WORDS = """
acorn adobe agate alder almond alpine amber anchor anvil apple apricot arbor arrow ash aspen aster atlas autumn azure badge
bamboo banjo banner barley basil basin beacon beaver bell berry birch bison blade blossom bonnet border boulder bramble brass
breeze brick bridge bronze brook bucket buckle bugle butter button cabin cactus camel candle canoe canyon carbon cargo carpet
castle cedar cello chalk cherry chisel cinder citrus clay cliff clover cobalt cobra comet compass copper coral cotton cougar
cove coyote crane crater creek cricket crimson crow crystal cypress daisy dawn delta desert dingo dolphin dove dragon drum dune
eagle ebony echo elder elm ember emerald engine fable falcon feather fern ferry fiddle field finch fjord flame flint flute forest
fossil fox frost galaxy garnet gazelle geyser ginger glacier glen goose granite grape grove guitar gull hammer harbor harp hawk
hazel heather helm heron hickory hill honey horizon hornet indigo iris iron island ivory ivy jade jaguar jasmine jasper jet juniper
kayak kelp kettle kite lagoon lantern larch lark laurel lava lemon lilac lily lime linen lion lotus lynx magnet magpie mango maple
marble marsh meadow melon mesa mint mirror mist moose moss nectar needle nickel nutmeg oak oasis ocean olive onyx opal orbit orchid
osprey otter owl oyster paddle panther parrot peach pearl pebble pepper petal pigeon pine planet plum pollen pond poplar poppy
prairie prism quail quartz quill rabbit raft rain raven reef ribbon ridge river robin rocket rose ruby rye saddle saffron sage
salmon sand sapphire satin scarlet sea shadow shell shore silk silver sky slate snow sparrow spruce star stone storm summit swan
"""

WORDS = tuple(_WORDS.split())
FIRST_WORDS, SECOND_WORDS = WORDS[::2], WORDS[1::2]


def is_unseen(name: str) -> bool:
    """Whether a name is of the eighth that training never uses."""
    return zlib.crc32(name.encode()) % 8 == 0


def draw_names(rng: Random, unseen: bool) -> list[str]:
    """Names in random order, all unseen or none; no word stands in two of them."""
    names, used = [], set()
    for first in rng.sample(FIRST_WORDS, len(FIRST_WORDS)):
        for second in rng.sample(SECOND_WORDS, 24):
            if second not in used and is_unseen(f"{first}-{second}") == unseen:
                names.append(f"{first}-{second}")
                used.add(second)
                break
    return names


# Values are numbers of three digits, so that code around the records has numbers of the same look.
VALUES = tuple(range(100, 356))
