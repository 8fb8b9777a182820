"""Trains the tokenizers of the `tiny` preset: kontext_jax/assets/tokenizers/{t5,clip}.

    python tools/make_tokenizers.py [--output kontext_jax/assets/tokenizers]

Both are trained on English captions and edit instructions that this script makes up from word
lists, so nothing is downloaded and the files come out the same every time. The formats are those
of the published models: for T5 a sentencepiece unigram model (`spiece.model`) and its
`tokenizer.json`; for CLIP byte-level BPE (`vocab.json`, `merges.txt`) and its `tokenizer.json`.
CLIP's knows all bytes. T5's knows the characters below; any other becomes its <unk>, as in the
published one.
"""

import argparse
import io
import json
import random
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, models, trainers
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

VOCAB_SIZE = 1024  # of both; presets.PRESETS["tiny"] has embeddings for so many
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
NUM_LINES = 12_000
SEED = 0

ASCII = "".join(chr(c) for c in range(33, 127))
OTHER_CHARACTERS = "ÄÅÇÉÑÖÜßàáâãäåæçèéêëíîïñóôõöøúûüœ¡¿°±²×·–—‘’“”„…•€™→"

WORDS = {
    "colour": """red green blue yellow orange purple pink brown black white grey gray cyan magenta
        turquoise teal violet beige golden silver crimson navy maroon olive""",
    "tone": "dark light bright pale deep vivid pastel neon",
    "shape": """circle square triangle rectangle star ellipse oval ring cross diamond pentagon
        hexagon line arrow heart dot cube sphere cone cylinder stripe moon crescent polygon
        shape""",
    "thing": """cat dog bird horse fish rabbit bear fox lion cow sheep duck butterfly car truck bus
        train bicycle boat ship plane house tower castle bridge tree flower rose leaf grass cup mug
        glass bottle plate bowl book lamp chair table sofa bed clock phone camera computer guitar
        piano ball balloon kite umbrella hat cap crown helmet scarf shirt jacket coat dress shoe
        boot bag backpack necklace watch apple banana lemon cherry cake pizza bread cookie candle
        box key coin stone cloud sun rainbow mountain window door sign flag statue robot toy""",
    "person": """man woman girl boy child person baby king queen astronaut knight wizard dancer
        singer doctor chef artist""",
    "part": "hair face eyes hand arm head nose mouth ear tail wing fur skin beard glasses smile",
    "place": """beach forest city street park garden kitchen room office desert field river lake
        sea ocean island village market museum library school station road snow space""",
    "scene": """sky background foreground ground wall floor water scene picture image photo
        photograph""",
    "size": "small large big tiny huge tall short wide narrow thin thick long",
    "quality": """old new young happy sad wooden metal glass stone plastic leather striped spotted
        checkered plain shiny soft rough smooth round sharp blurry empty full open closed broken
        clean dirty wet dry warm cold beautiful simple modern ancient realistic colorful""",
    "where": """left right top bottom middle center centre corner edge side upper lower front""",
    "near": """on under above below beside behind over inside outside near between against in
        across around next with without""",
    "doing": """sitting standing running walking jumping flying sleeping eating reading holding
        wearing looking playing swimming riding smiling dancing""",
    "style": """painting watercolor sketch drawing cartoon poster sculpture oil pencil ink pixel
        vintage anime comic illustration render sepia monochrome""",
    "light": """sunset sunrise night day morning evening winter summer autumn spring rain fog storm
        fire shadow light sunlight moonlight""",
    "number": "one two three four five six seven eight nine ten zero 1 2 3 4 5 6 7 8 9 10 12 20 50",
    "text": "Hello Welcome Open Sale Stop Love Kontext Flux Jax OK",
    "compare": "bigger smaller larger taller shorter longer wider thicker thinner darker brighter",
    "common": """I you he she we they me him us them my your his her our their its this that these
        those some any every each all both other another such very much many more most less few only
        just also too still now then here there when where what which who why how if so as than like
        into onto from for at by of off out up down away back through along toward until while and
        or but not no yes be is are was were been has have had do does did can could will would
        should may must let please look looks looking seem see show give take get keep kept hold
        make made making turn turned put place move moved remove replace add change create use using
        draw paint cut fill colour color crop zoom rotate flip mirror swap restore convert transform
        apply edit keep preserve same exactly different identity pose expression camera angle view
        close-up portrait landscape style texture pattern letter word text font title logo line
        way part thing things people face body clothes clothing suit uniform outfit hairstyle""",
}
IRREGULAR_PLURALS = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "fish": "fish",
    "sheep": "sheep",
    "leaf": "leaves",
}
TEMPLATES = """
a {size} {colour} {shape} on a {colour} background
a {tone} {colour} {shape} and a {colour} {shape}
{number} {colour} {shapes} and {number} {size} {colour} {shapes}
a {colour} {shape} {near} a {size} {colour} {shape}
a {colour} {shape} in the {where} {where} corner
a {colour} {shape} to the {where} of a {colour} {shape}
there is a {quality} {thing} {near} the {quality} {thing}
a photo of a {quality} {colour} {thing} {near} a {thing}
a {person} {doing} {near} a {thing} in the {place}
a {quality} {person} with {colour} {part}, {doing} at {light}
the {person} is {doing} with a {colour} {thing}
{quality} {place} in {light}, {style} style, high quality, detailed
an image of {number} {things}, {style}
replace the {colour} {shape} with a {colour} {shape}
replace the {thing} with a {quality} {thing}
replace the text "{text}" with "{text}"
remove the {colour} {shape}
remove the {thing} from the {scene}, keep everything else the same
delete the {shape} on the {where}
erase all {things} behind the {person}
add a {size} {colour} {shape} {near} the {shape}
add a {colour} {thing} to the {person}'s {part}
add {number} more {colour} {shapes}
make the {shape} {colour}
make the {colour} {shape} {compare}
make it {light}, with {tone} {light} and {colour} {scene}
make the {person}'s {part} {colour}
turn the {colour} {shape} into a {shape}
turn this {scene} into a {style}
turn the {thing} upside down
rotate the {shape} by {number}0 degrees to the {where}
move the {colour} {shape} to the {where}
move the {thing} a little to the {where}, closer to the {thing}
swap the {colour} {shape} and the {colour} {shape}
change the {scene} to {colour}
change the colour of the {thing} from {colour} to {colour}
change the background to a {place} at {light} while keeping the {person} in the same position
put the {colour} {thing} {near} the {thing}
put a {thing} on his head and a {thing} in her hand
place the {shape} in the {where} of the {scene}
fill the {shape} with {colour} stripes
flip the {scene} so that it is a mirror image
crop the {scene} and zoom in on the {where} half
shrink the {colour} {shape} and enlarge the {thing}
copy the {shape} {number} times
write "{text}" on the {thing}
restore and colorize this {quality} {scene}
convert to black and white {style}
blur the {scene}, sharpen the {thing}
do not change anything but the {thing}; do it again
using this style, create a {quality} {thing} and one {person}
what if the {thing} was {quality} and {size}?
show me the same {person} from the {where}, {doing} in the {place}!
the {thing} should be more {quality}, less {quality}
give the {person} a {colour} {thing} instead of the {thing}
nothing else has changed, only its {part} and their {thing}
""".strip().splitlines()


def write_corpus() -> list[str]:
    """Captions and instructions; every third line is capitalised, every hundredth upper case."""
    rng = random.Random(SEED)
    words = {kind: text.split() for kind, text in WORDS.items()}
    words |= {f"{kind}s": [plural(word) for word in words[kind]] for kind in ("shape", "thing")}

    class Draw(dict):
        def __missing__(self, kind):
            return rng.choice(words[kind])

    lines = []
    for i in range(NUM_LINES):
        line = TEMPLATES[i % len(TEMPLATES)].format_map(Draw())
        if i % 100 == 0:
            line = line.upper()
        elif i % 3 == 0:
            line = line[0].upper() + line[1:] + rng.choice([".", ".", "!", ""])
        lines.append(line)
    # Each word alone and before a comma: sentencepiece proposes only what two words share.
    alone = {word for line in lines if not line.isupper() for word in line.strip(".!?").split()}
    alone = sorted(alone) + 30 * [word for kind in sorted(words) for word in words[kind]]
    return lines + [form for word in alone for form in (word, f"{word},")]


def plural(noun: str) -> str:
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "sh", "ch")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def make_t5(corpus: list[str], folder: Path) -> None:
    """sentencepiece unigram with T5's special ids: <pad> 0, </s> 1, <unk> 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_SIZE,
        # No table of character forms: sentencepiece's own takes more room than the vocabulary.
        normalization_rule_name="identity",
        required_chars=ASCII + OTHER_CHARACTERS,
        character_coverage=1.0,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0, model_max_length=512)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(
        folder / "tokenizer_config.json",
        {
            "eos_token": "</s>",
            "extra_ids": 0,
            "model_max_length": 512,
            "pad_token": "<pad>",
            "tokenizer_class": "T5Tokenizer",
            "unk_token": "<unk>",
        },
    )


def make_clip(corpus: list[str], folder: Path) -> None:
    """Byte-level BPE in CLIP's order: bytes, bytes that end a word, merges, start, end of text."""
    alphabet = bytes_alphabet()
    num_merges = VOCAB_SIZE - 2 * len(alphabet) - 2
    clip = CLIPTokenizer(vocab={CLIP_START: 0, CLIP_END: 1}, merges=[])
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = clip.backend_tokenizer.normalizer
    trained.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    trained.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            # More than enough: the alphabet that the trainer counts is only of what occurs.
            vocab_size=VOCAB_SIZE,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]][:num_merges]
    if len(merges) < num_merges:
        raise ValueError(f"the corpus gives {len(merges)} merges, {num_merges} are needed")
    pieces = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    pieces += [CLIP_START, CLIP_END]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(m) for m in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": CLIP_START,
            "eos_token": CLIP_END,
            "model_max_length": 77,
            "pad_token": CLIP_END,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": CLIP_END,
        },
    )


def bytes_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in the order of CLIP's vocabulary.

    Printable bytes stand for themselves and come first; the others are moved to 256 and up.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = 256 - len(printable)
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(moved)]


def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "kontext_jax" / "assets" / "tokenizers"
    parser.add_argument("--output", type=Path, default=default, help="folder to write into")
    output = parser.parse_args().output
    corpus = write_corpus()
    for kind, make in {"t5": make_t5, "clip": make_clip}.items():
        folder = output / kind
        folder.mkdir(parents=True, exist_ok=True)
        # Elsewhere first: transformers would rather read a tokenizer.json that is already there.
        with tempfile.TemporaryDirectory(dir=output) as made:
            make(corpus, Path(made))
            for path in sorted(Path(made).iterdir()):
                print(f"{path.stat().st_size:8d}  {path.replace(folder / path.name)}")


if __name__ == "__main__":
    main()
