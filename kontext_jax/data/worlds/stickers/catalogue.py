"""The objects of the sticker world: which drawing, what it is called, what sort of thing it is.

Each is in all four packages of `packages.py` under the same code point. Names are unique among all
names and synonyms, so that a word always means one object.
"""

import dataclasses
import functools

# Sorts that `HELD_OUT` is spread over.
CATEGORIES = ("animal", "plant", "food", "vehicle", "thing", "place")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of object.

    Attributes:
      code: Unicode code point of its drawings, in hexadecimal.
      name: noun in the singular.
      synonyms: other nouns for it.
      plural: plural of the name.
      category: one of CATEGORIES.
    """

    code: str
    name: str
    synonyms: tuple[str, ...]
    plural: str
    category: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All nouns in the singular, the first one preferred."""
        return self.name, *self.synonyms

    @property
    def is_plural(self) -> bool:
        """Whether one drawing shows several things ("grapes"), and no article stands before it."""
        return self.name == self.plural and self.name in _PLURAL_NAMES

    def plural_of(self, name: str) -> str:
        """Plural of one of `names`."""
        return self.plural if name == self.name else regular_plural(name)


_PLURAL_NAMES = (
    *("grapes", "cherries", "pancakes", "fries", "scissors", "glasses", "socks", "gloves"),
    *("corn", "broccoli", "cheese", "popcorn", "sushi"),
)


def regular_plural(noun: str) -> str:
    """For instance cats, foxes, daisies."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def _object(code: str, name: str, *synonyms: str, plural: str = "") -> Kind:
    return Kind(code, name, synonyms, plural or regular_plural(name))


_OBJECTS: dict[str, tuple[Kind, ...]] = {
    "animal": (
        _object("1f431", "cat", "kitty"),
        _object("1f436", "dog", "puppy"),
        _object("1f43b", "bear"),
        _object("1f43c", "panda"),
        _object("1f98a", "fox"),
        _object("1f981", "lion"),
        _object("1f42f", "tiger"),
        _object("1f42e", "cow"),
        _object("1f437", "pig", "piglet"),
        _object("1f42d", "mouse", plural="mice"),
        _object("1f430", "rabbit", "bunny"),
        _object("1f438", "frog"),
        _object("1f435", "monkey"),
        _object("1f428", "koala"),
        _object("1f984", "unicorn"),
        _object("1f43a", "wolf", plural="wolves"),
        _object("1f434", "horse", "pony"),
        _object("1f418", "elephant"),
        _object("1f992", "giraffe"),
        _object("1f993", "zebra"),
        _object("1f98f", "rhino", "rhinoceros"),
        _object("1f99b", "hippo", "hippopotamus"),
        _object("1f98c", "deer", plural="deer"),
        _object("1f42b", "camel"),
        _object("1f999", "llama"),
        _object("1f998", "kangaroo"),
        _object("1f994", "hedgehog"),
        _object("1f99d", "raccoon"),
        _object("1f9a5", "sloth"),
        _object("1f9a6", "otter"),
        _object("1f43f", "squirrel", "chipmunk"),
        _object("1f987", "bat"),
        _object("1f427", "penguin"),
        _object("1f989", "owl"),
        _object("1f986", "duck"),
        _object("1f9a2", "swan"),
        _object("1f99c", "parrot"),
        _object("1f9a9", "flamingo"),
        _object("1f99a", "peacock"),
        _object("1f413", "rooster"),
        _object("1f424", "chick"),
        _object("1f985", "eagle"),
        _object("1f422", "turtle", "tortoise"),
        _object("1f40a", "crocodile", "alligator"),
        _object("1f98e", "lizard"),
        _object("1f40d", "snake"),
        _object("1f996", "dinosaur"),
        _object("1f409", "dragon"),
        _object("1f433", "whale"),
        _object("1f42c", "dolphin"),
        _object("1f988", "shark"),
        _object("1f420", "fish", plural="fish"),
        _object("1f419", "octopus"),
        _object("1f980", "crab"),
        _object("1f99e", "lobster"),
        _object("1f40c", "snail"),
        _object("1f98b", "butterfly", plural="butterflies"),
        _object("1f41d", "bee", "honeybee"),
        _object("1f41e", "ladybug", "ladybird"),
        _object("1f577", "spider"),
        _object("1f982", "scorpion"),
        _object("1f41b", "caterpillar"),
    ),
    "plant": (
        _object("1f333", "tree"),
        _object("1f332", "pine"),
        _object("1f334", "palm"),
        _object("1f335", "cactus", plural="cacti"),
        _object("1f33b", "sunflower"),
        _object("1f337", "tulip"),
        _object("1f339", "rose"),
        _object("1f344", "mushroom", "toadstool"),
        _object("1f340", "clover"),
        _object("1f341", "leaf", plural="leaves"),
        _object("1f33c", "daisy", plural="daisies"),
        _object("1f490", "bouquet"),
    ),
    "food": (
        _object("1f34e", "apple"),
        _object("1f34c", "banana"),
        _object("1f347", "grapes", plural="grapes"),
        _object("1f353", "strawberry", plural="strawberries"),
        _object("1f352", "cherries", plural="cherries"),
        _object("1f34a", "orange"),
        _object("1f34b", "lemon"),
        _object("1f349", "watermelon"),
        _object("1f34d", "pineapple"),
        _object("1f351", "peach"),
        _object("1f350", "pear"),
        _object("1f95d", "kiwi"),
        _object("1f951", "avocado"),
        _object("1f345", "tomato", plural="tomatoes"),
        _object("1f346", "eggplant", "aubergine"),
        _object("1f955", "carrot"),
        _object("1f33d", "corn", plural="corn"),
        _object("1f966", "broccoli", plural="broccoli"),
        _object("1f336", "pepper", "chili"),
        _object("1f9c0", "cheese", plural="cheese"),
        _object("1f95a", "egg"),
        _object("1f95e", "pancakes", plural="pancakes"),
        _object("1f950", "croissant"),
        _object("1f968", "pretzel"),
        _object("1f354", "burger", "hamburger"),
        _object("1f355", "pizza"),
        _object("1f32d", "hotdog"),
        _object("1f32e", "taco"),
        _object("1f369", "donut", "doughnut"),
        _object("1f36a", "cookie", "biscuit"),
        _object("1f382", "cake"),
        _object("1f9c1", "cupcake", "muffin"),
        _object("1f36d", "lollipop"),
        _object("1f366", "sundae"),
        _object("1f37f", "popcorn", plural="popcorn"),
        _object("1f35f", "fries", plural="fries"),
        _object("1f363", "sushi", plural="sushi"),
        _object("2615", "coffee", plural="coffees"),
        _object("1f37a", "beer"),
        _object("1f377", "wine glass", "glass of wine"),
        _object("1f379", "cocktail"),
        _object("1fad6", "teapot"),
    ),
    "vehicle": (
        _object("1f697", "car", "automobile"),
        _object("1f695", "taxi", "cab"),
        _object("1f68c", "bus"),
        _object("1f691", "ambulance"),
        _object("1f692", "firetruck"),
        _object("1f693", "police car"),
        _object("1f69c", "tractor"),
        _object("1f69a", "truck", "lorry", plural="trucks"),
        _object("1f6b2", "bicycle", "bike"),
        _object("1f6f5", "scooter"),
        _object("1f3cd", "motorcycle", "motorbike"),
        _object("1f682", "train", "locomotive"),
        _object("1f681", "helicopter"),
        _object("2708", "airplane", "plane"),
        _object("1f680", "rocket"),
        _object("1f6f8", "ufo", "spaceship"),
        _object("26f5", "sailboat"),
        _object("1f6a2", "ship"),
        _object("1f6f6", "canoe"),
        _object("1f6f9", "skateboard"),
    ),
    "thing": (
        _object("26bd", "football", "soccer ball"),
        _object("1f3c0", "basketball"),
        _object("1f3af", "target", "bullseye"),
        _object("1f388", "balloon"),
        _object("1f381", "gift", "present"),
        _object("1f3b8", "guitar"),
        _object("1f3ba", "trumpet"),
        _object("1f3bb", "violin"),
        _object("1f941", "drum"),
        _object("1f3a8", "palette"),
        _object("1f9f8", "teddy"),
        _object("1f3c6", "trophy", plural="trophies"),
        _object("1fa81", "kite"),
        _object("1f3b2", "die", plural="dice"),
        _object("1f514", "bell"),
        _object("1f511", "key"),
        _object("1f512", "lock", "padlock"),
        _object("1f528", "hammer"),
        _object("1fa93", "axe"),
        _object("1fa9c", "ladder"),
        _object("1fa91", "chair"),
        _object("1f6cb", "sofa", "couch"),
        _object("1f4a1", "bulb", "lamp"),
        _object("1f56f", "candle"),
        _object("23f0", "clock"),
        _object("1f4f7", "camera"),
        _object("1f4fa", "television", "tv"),
        _object("1f4f1", "phone"),
        _object("1f4bb", "laptop"),
        _object("1f4d5", "book"),
        _object("270f", "pencil"),
        _object("2702", "scissors", plural="scissors"),
        _object("1f4cc", "pin"),
        _object("1f48e", "diamond", "gem"),
        _object("1f451", "crown"),
        _object("1f48d", "ring"),
        _object("1f453", "glasses", plural="glasses"),
        _object("1f45f", "sneaker", "shoe"),
        _object("1f462", "boot"),
        _object("1f455", "shirt"),
        _object("1f457", "dress", plural="dresses"),
        _object("1f9e6", "socks", plural="socks"),
        _object("1f9e4", "gloves", plural="gloves"),
        _object("1f3a9", "hat"),
        _object("1f392", "backpack"),
        _object("1f45c", "handbag"),
        _object("2602", "umbrella"),
        _object("1f9f9", "broom"),
        _object("1faa3", "bucket", "pail"),
        _object("1f9f2", "magnet"),
        _object("1f52d", "telescope"),
        _object("1f916", "robot"),
        _object("1f47b", "ghost"),
        _object("1f383", "pumpkin"),
        _object("26c4", "snowman", plural="snowmen"),
        _object("2693", "anchor"),
    ),
    "place": (
        _object("1f3e0", "house"),
        _object("1f3f0", "castle"),
        _object("26fa", "tent"),
        _object("1f5fc", "tower"),
        _object("1f3a1", "ferris wheel"),
        _object("1f30b", "volcano", plural="volcanoes"),
        _object("26f2", "fountain"),
        _object("1f30d", "globe", "earth", plural="globes"),
        _object("2b50", "star"),
        _object("2600", "sun"),
        _object("1f319", "moon"),
        _object("1fa90", "planet"),
        _object("2601", "cloud"),
        _object("1f308", "rainbow"),
        _object("2744", "snowflake"),
        _object("1f525", "fire", "flame"),
    ),
}

OBJECTS: tuple[Kind, ...] = tuple(
    dataclasses.replace(kind, category=category)
    for category, kinds in _OBJECTS.items()
    for kind in kinds
)


@functools.cache
def by_name() -> dict[str, Kind]:
    """Every name and synonym → its object."""
    return {name: kind for kind in OBJECTS for name in kind.names}
