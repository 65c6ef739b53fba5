"""Synthetic reviews with a sentiment: for trying text methods without any file.

A sentence is a template filled with a subject, opinion words of its class, neutral fillers and an optional neutral
clause; one in eight templates negates an opinion word of the *other* class ("not boring"), so that single words are not
the whole answer. A share of the labels is wrong on purpose, which caps the accuracy at about 95 %. No text occurs twice.
"""

from __future__ import annotations

from pathlib import Path

import torch

from backdoorlab.core.seeding import make_generator
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets
from backdoorlab.data.split import Dataset, Split, text_array

_TRAIN, _TEST = 4000, 1000
_LABEL_NOISE = 0.05
_CLASSES = ("negative", "positive")

_ADJECTIVES = (
    """awful terrible boring dull tedious clumsy bland shallow predictable annoying dreadful disappointing lifeless
    pointless sloppy messy stale hollow forgettable lazy weak painful unfunny muddled flat tiresome grating cheap
    incoherent ugly overlong pretentious cliched wooden lame horrible dismal mediocre soulless ridiculous irritating
    confused unbearable empty mean silly wasted amateurish joyless inept""".split(),
    """wonderful brilliant delightful moving charming clever gripping superb touching elegant excellent hilarious
    beautiful inspired graceful fresh witty thrilling warm masterful rich enchanting memorable lovely powerful honest
    dazzling engaging tender heartfelt splendid fascinating exquisite stunning smart vivid absorbing refreshing
    terrific marvelous compelling poignant joyous sublime playful sharp remarkable captivating radiant poetic""".split(),
)
_VERBS = (
    "hated despised regretted disliked loathed resented endured suffered mocked dreaded".split(),
    "loved adored enjoyed admired treasured praised savored relished cherished applauded".split(),
)
_SUBJECTS = """the film|the movie|the plot|the story|the script|the dialogue|the acting|the lead actor|the camera work|
the soundtrack|the music|the ending|the first half|the second act|the pacing|the cast|the direction|this remake|
this sequel|the documentary|this comedy|this drama|the animation|the humor|the editing|the final scene|the novel|
the book|the author's style|the main character|the villain|the romance|the opening|the screenplay|the show|the series|
the pilot episode|the whole season|the performance|the concert""".replace("\n", "").split("|")
_PEOPLE = "my brother|my friends|the critics|most viewers|i|we|our group|the audience|my sister|everyone at work".split(
    "|"
)
_ADVERBS = "really quite rather truly mostly honestly simply fairly utterly somewhat".split()
_CLAUSES = """|||||, which runs for about two hours|, as we saw it on a rainy tuesday|, set in a small town near the coast|
, based on a true event| from the studio in london| that opened last week|, shown in the old theater downtown|
, released in early spring|, which my neighbor had mentioned| that they filmed in two months""".replace("\n", "").split(
    "|"
)
_OPENERS = """|||||to be fair , |last night , |in the end , |after a long week , |for what it is worth , |
once the lights went down , |speaking as a regular viewer , |all in all , """.replace("\n", "").split("|")
_CLOSERS = """|||||| and the seats were full| and then we went home| while it was raining outside| at least on a big screen|
 even on a second viewing| for a monday evening""".replace("\n", "").split("|")

# S subject, C clause, A and B adjectives of the class, O adjective of the other class, V verb, P people, R adverb.
_TEMPLATES = (
    "{S}{C} is {R} {A}", "{S}{C} was {A} and {R} {B}", "i found {S}{C} {R} {A}", "{P} {V} {S}{C}",
    "what {an A} piece of work {S}{C} is", "{P} said that {S}{C} felt {A} , even {B}", "{A} from start to finish , {S}{C} is {B}",
    "there is something {R} {A} about {S}{C}", "if you ask me , {S}{C} looks {A}", "{S}{C} , {A} as it is , was {V} by {P}",
    "few things this year were as {A} as {S}{C}", "{P} {V} {S}{C} because it is {R} {B}",
    "{S}{C} is anything but {O}", "nobody could call {S}{C} {O} : it is {A}",
)  # fmt: skip


@datasets.register
class TemplatedText(DatasetSource):
    """4,000 + 1,000 sentences, generated from the seed."""

    name = "templated_text"
    modalities = ("text",)
    summary = "4,000 + 1,000 synthetic reviews, negative or positive, 5 % label noise (generated from the seed)"

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        generator = make_generator(spec.seed, "templated_text")
        total = _TRAIN + _TEST
        texts: dict[str, int] = {}
        while len(texts) < total:
            sentiment = len(texts) % 2  # alternate, so that every prefix is balanced
            draws = torch.randint(0, 2**31, (16,), generator=generator).tolist()
            texts.setdefault(sentence(sentiment, draws), sentiment)
        labels = torch.tensor(list(texts.values()))
        for rows in (slice(0, _TRAIN), slice(_TRAIN, total)):
            part = labels[rows].clone()
            for k in (0, 1):  # as many wrong labels in either class: the classes stay balanced
                mine = (labels[rows] == k).nonzero().flatten()
                wrong = mine[torch.randperm(len(mine), generator=generator)[: round(_LABEL_NOISE * len(mine))]]
                part[wrong] = 1 - k
            labels[rows] = part
        whole = Split(text_array(list(texts)), labels, _CLASSES)
        train, test = whole[torch.arange(_TRAIN)], whole[torch.arange(_TRAIN, total)]
        return Dataset("templated_text", "text", train, test, note="synthetic")


def sentence(sentiment: int, draws: list[int]) -> str:
    """One sentence of the given sentiment; ``draws`` are 16 large random numbers, one per choice."""

    def pick(i: int, options: list[str] | tuple[str, ...]) -> str:
        return options[draws[i] % len(options)]

    first = pick(0, _ADJECTIVES[sentiment])
    words = {
        "A": first, "an A": f"{'an' if first[0] in 'aeiou' else 'a'} {first}", "B": pick(1, _ADJECTIVES[sentiment]),
        "O": pick(2, _ADJECTIVES[1 - sentiment]), "V": pick(3, _VERBS[sentiment]), "S": pick(4, _SUBJECTS),
        "P": pick(5, _PEOPLE), "R": pick(6, _ADVERBS), "C": pick(7, _CLAUSES),
    }  # fmt: skip
    return f"{pick(8, _OPENERS)}{pick(9, _TEMPLATES).format_map(words)}{pick(10, _CLOSERS)} ."
