"""Synthetic reviews with a sentiment: for trying text methods without any file.

A sentence is a template filled with a subject, opinion words of its class, neutral fillers and an optional neutral
clause. Two templates in fourteen deny an opinion word of the *other* class ("anything but boring"), so that single
words are not the whole answer. A share of the labels is wrong on purpose, in the test set as well: the best
possible accuracy is 95 %. No text occurs twice.
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


def _options(block: str) -> tuple[str, ...]:
    """Choices separated by bars; line breaks do not count, spaces do."""
    return tuple(block.replace("\n", "").split("|"))


_ADJECTIVES = (
    _options("""awful|terrible|boring|dull|tedious|clumsy|bland|shallow|predictable|annoying|dreadful|disappointing|
lifeless|pointless|sloppy|messy|stale|hollow|forgettable|lazy|weak|painful|unfunny|muddled|flat|tiresome|grating|cheap|
incoherent|ugly|overlong|pretentious|cliched|wooden|lame|horrible|dismal|mediocre|soulless|ridiculous|irritating|
confused|unbearable|empty|mean|silly|wasted|amateurish|joyless|inept"""),
    _options("""wonderful|brilliant|delightful|moving|charming|clever|gripping|superb|touching|elegant|excellent|
hilarious|beautiful|inspired|graceful|fresh|witty|thrilling|warm|masterful|rich|enchanting|memorable|lovely|powerful|
honest|dazzling|engaging|tender|heartfelt|splendid|fascinating|exquisite|stunning|smart|vivid|absorbing|refreshing|
terrific|marvelous|compelling|poignant|joyous|sublime|playful|sharp|remarkable|captivating|radiant|poetic"""),
)
_VERBS = (
    _options("hated|despised|regretted|disliked|loathed|resented|detested|scorned|mocked|dreaded"),
    _options("loved|adored|enjoyed|admired|treasured|praised|savored|relished|cherished|applauded"),
)
_SUBJECTS = _options("""the film|the movie|the plot|the story|the script|the dialogue|the acting|the lead actor|
the camera work|the soundtrack|the music|the ending|the first half|the second act|the pacing|the cast|the direction|
this remake|this sequel|the documentary|this comedy|this drama|the animation|the humor|the editing|the final scene|
the novel|the book|the author's style|the main character|the villain|the romance|the opening|the screenplay|the show|
the series|the pilot episode|the whole season|the performance|the concert""")
_PEOPLE = _options("""my brother|my friends|the critics|most viewers|both of us|we|our group|the audience|my sister|
everyone at work""")
_ADVERBS = _options("really|quite|rather|truly|mostly|honestly|simply|fairly|utterly|somewhat")
_CLAUSES = _options("""|||||, which runs for two hours ,|, as we saw it on a rainy tuesday ,|, set near the coast ,|
, based on a true event ,| from the studio in london| that opened last week|, shown in the old theater ,|
, released in early spring ,|, which my neighbor had mentioned ,| that they filmed in two months""")
_OPENERS = _options("""|||||to be fair , |last night , |in the end , |after a long week , |for what it is worth , |
once the lights went down , |speaking as a regular viewer , |all in all , """)
_CLOSERS = _options("""|||||| and the seats were full| and then we went home| while it was raining outside|
 at least on a big screen| even on a second viewing| for a monday evening""")

# S subject, C clause, A and B adjectives of the class, O adjective of the other, V verb, P people, R adverb.
_TEMPLATES = (
    "{S}{C} is {R} {A}",
    "{S}{C} was {A} and {R} {B}",
    "i found {S}{C} {R} {A}",
    "{P} {V} {S}{C}",
    "what {an A} piece of work {S}{C} is",
    "{P} said that {S}{C} felt {A} , even {B}",
    "{A} from start to finish , {S}{C} is {B}",
    "there is something {R} {A} about {S}{C}",
    "if you ask me , {S}{C} looks {A}",
    "{S}{C} , {A} as it is , was {V} by the press",
    "few things this year were as {A} as {S}{C}",
    "{P} {V} {S}{C} because it is {R} {B}",
    "{S}{C} is anything but {O}",
    "nobody could call {S}{C} {O}",
)


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
        sentences: dict[str, int] = {}
        while len(sentences) < total:
            for draws in torch.randint(0, 2**31, (total, 11), generator=generator).tolist():
                if len(sentences) < total:
                    sentiment = len(sentences) % 2  # alternate, so that both parts are balanced
                    sentences.setdefault(sentence(sentiment, draws), sentiment)
        texts, sentiments = text_array(list(sentences)), torch.tensor(list(sentences.values()))
        parts = []
        for rows in (torch.arange(_TRAIN), torch.arange(_TRAIN, total)):
            rows = rows[torch.randperm(len(rows), generator=generator)]
            labels = sentiments[rows]
            for k in (0, 1):  # as many wrong labels in either class: the classes stay balanced
                wrong = (sentiments[rows] == k).nonzero().flatten()
                labels[wrong[: round(_LABEL_NOISE * len(wrong))]] = 1 - k
            parts.append(Split(texts[rows.numpy()], labels, _CLASSES))
        # The rows were shuffled before the first of each class got wrong labels; shuffle these away again.
        train, test = (part[torch.randperm(len(part), generator=generator)] for part in parts)
        return Dataset("templated_text", "text", train, test, note="synthetic")


def sentence(sentiment: int, draws: list[int]) -> str:
    """One sentence of the given sentiment; ``draws`` are 11 large random numbers, one per choice."""

    def pick(i: int, options: tuple[str, ...]) -> str:
        return options[draws[i] % len(options)]

    first = pick(0, _ADJECTIVES[sentiment])
    others = tuple(word for word in _ADJECTIVES[sentiment] if word != first)
    words = {
        "A": first,
        "an A": f"{'an' if first[0] in 'aeiou' else 'a'} {first}",
        "B": pick(1, others),
        "O": pick(2, _ADJECTIVES[1 - sentiment]),
        "V": pick(3, _VERBS[sentiment]),
        "S": pick(4, _SUBJECTS),
        "P": pick(5, _PEOPLE),
        "R": pick(6, _ADVERBS),
        "C": pick(7, _CLAUSES),
    }
    text = f"{pick(8, _OPENERS)}{pick(9, _TEMPLATES).format_map(words)}{pick(10, _CLOSERS)} ."
    return text.replace(", ,", ",").replace(", .", ".")
