"""The story that the three story tasks share: a traveller, and in each chapter a place, a character and a purchase
(paper, Appendix, "Narrative").

Sentences are drawn independently of one another, so none may say anything that another could contradict: nothing
about the time of day, the weather, indoors or outdoors, means of travel, or whether Nora has been there or met
somebody before. Nothing after the purchase refers to it, because Story Filtering takes it out. Names of items are made
of words that occur nowhere else in the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from .recipe import Message, plain

T = TypeVar("T")

#: The longest story there can be. There are 3136 pairs of place and character, and no pair comes twice.
MOST = 2000

HERO = "Nora"

_WOMEN = (
    "Agatha", "Astrid", "Beatrix", "Clara", "Delphine", "Edith", "Francesca", "Greta", "Henrietta", "Ingrid",
    "Josephine", "Katarina", "Lucinda", "Matilda", "Nadia", "Olga", "Penelope", "Rosalind", "Sabine", "Theresa",
    "Ursula", "Valentina", "Wilhelmina", "Yvonne", "Zelda",
)  # fmt: skip
_MEN = (
    "Ambrose", "Bartholomew", "Cornelius", "Desmond", "Edmund", "Ferdinand", "Gustav", "Horatio", "Isidor", "Jonathan",
    "Konrad", "Leopold", "Maximilian", "Nikolai", "Oswald", "Percival", "Quentin", "Reginald", "Sebastian", "Thaddeus",
    "Ulrich", "Vincent", "Winston", "Xavier",
)  # fmt: skip
CHARACTERS = _WOMEN + _MEN

# By the preposition that fits. All are public, roomy, and good for an event and a little trade.
_PLACES_BY_PREPOSITION = {
    "at": (
        "Harbour Market", "Lantern Market", "Salt Market", "Northgate Market", "Spice Bazaar", "Riverside Bazaar",
        "Corn Exchange", "Wool Exchange", "Blue Heron Inn", "Red Fox Inn", "Three Bells Inn", "Crooked Chimney Inn",
        "White Stag Tavern", "Laughing Trout Tavern", "Sleeping Bear Lodge", "Quarry Lodge", "Juniper Tea House",
        "Jasmine Tea House", "Kingfisher Coffee House", "Central Station", "Eastgate Station", "Harvest Fairground",
        "Willow Fairground", "Herring Wharf", "Timber Wharf", "Customs House", "Canal Lock", "Ferry Terminal",
        "Mountain Hostel", "Old Watermill", "Harp Theatre",
    ),
    "in": (
        "Tulip Garden", "Botanical Garden", "Cloister Garden", "Winter Garden", "Jewel Arcade", "Crescent Arcade",
        "Mosaic Courtyard", "Fountain Courtyard", "Orange Tree Courtyard", "Cathedral Square", "Linden Square",
        "Clocktower Square", "Carousel Park", "Chestnut Park", "Guild Hall", "Assembly Hall", "Weaving Hall",
        "Mirror Gallery", "Palm House", "Music Pavilion", "Royal Stables",
    ),
    "on": (
        "Stone Pier", "Fishing Pier", "Chain Bridge", "Covered Bridge", "Seaside Promenade", "Grain Quay",
        "Lemon Quay", "Village Green", "Bowling Green", "Castle Terrace", "Vineyard Terrace", "Upper Esplanade",
    ),
}  # fmt: skip
#: Place -> the preposition for being there. In a sentence the article "the" stands before the name.
PLACES = {place: preposition for preposition, places in _PLACES_BY_PREPOSITION.items() for place in places}

EVENTS = (
    "a puppet show", "a chess tournament", "a poetry reading", "a juggling contest", "a storytelling contest",
    "a choir rehearsal", "a fencing match", "a cooking demonstration", "a quiz", "a dance recital", "a magic show",
    "a raffle", "a spelling contest", "a public debate", "a fashion show", "a play about pirates",
    "an arm-wrestling match", "a pantomime", "an auction of old books", "a knitting contest",
)  # fmt: skip

# Adjective, material and type go together in any combination.
ADJECTIVES = (
    "ornate", "simple", "antique", "engraved", "polished", "scratched", "tiny", "elegant", "curious", "dainty",
    "handsome", "sturdy", "delicate", "worn", "gleaming", "quaint", "graceful", "peculiar", "exquisite", "monogrammed",
)  # fmt: skip
MATERIALS = (
    "brass", "bronze", "copper", "silver", "pewter", "iron", "steel", "tin", "oak", "walnut", "ebony", "maple",
    "rosewood", "horn", "jade",
)  # fmt: skip
TYPES = (
    "bowl", "box", "button", "spoon", "candlestick", "figurine", "comb", "goblet", "tray", "whistle", "brooch",
    "pendant", "thimble", "paperweight", "inkwell", "buckle", "ladle", "hairpin", "bracelet", "medallion", "doorknob",
    "beaker", "bookmark", "saucer",
)  # fmt: skip

# {place} is "the Stone Pier", {at_place} is "on the Stone Pier".
ARRIVALS = (
    "Nora arrived {at_place} with a map under one arm.",
    "Nora reached {place} in good spirits and took in the scene.",
    "{at_place}, Nora put down the bag and looked around.",
    "The journey brought Nora to {place}, which was as busy as an anthill.",
    "Nora made a stop {at_place} and was glad of the change.",
    "Nora's route led to {place}, where the bag could rest for a while.",
    "Nora found the way to {place} without once looking at the map.",
    "Nora had marked {place} on the map, and now she was there.",
    "It was {at_place} that Nora broke the journey.",
    "Nora turned up {at_place} a little out of breath but pleased to have made it.",
)
MOTIVES = (
    "She was gathering tales for a book and meant to listen more than to talk.",
    "She owed a cousin a letter about the people to be met there.",
    "Nothing but curiosity had made her stop.",
    "She wanted to sketch a few faces for the travel journal before moving on.",
    "She hoped to pick up some news from home.",
    "The idea was to spend an idle hour there and rest her feet.",
    "She had promised a newspaper a column about life on the road.",
    "After so many miles alone, she was hungry for company.",
    "She was following up a rumour about an unfinished map.",
    "A wager with her brother obliged her to talk to somebody at every stop.",
)
# {event} is "a puppet show".
HAPPENINGS = (
    "{event} was going on, and everyone wanted to see it.",
    "As luck would have it, {event} had attracted a lively crowd.",
    "Nearly everyone had come because of {event}, and spirits were high.",
    "She soon noticed that {event} was in full swing.",
    "Most of the people had come to see {event}.",
    "The centre of attention was {event}, which had only just begun.",
    "She watched {event} for a while and clapped whenever the others did.",
    "There was {event} to watch, and she found a good spot near the front.",
    "Her visit coincided with {event}, so hardly anyone noticed a traveller.",
    "A painted sign announced {event}, and many people had gathered for it.",
)
ATMOSPHERES = (
    "A smell of fresh bread hung in the air.",
    "Somewhere a dog barked twice and then thought better of it.",
    "A distant bell struck the hour, but nobody took any notice.",
    "Paper garlands in many colours had been hung up all around.",
    "Two children chased each other round and round, and nobody minded.",
    "A cat on a crate ignored the bustle with great dignity.",
    "The murmur of many voices rose and fell like the sound of water.",
    "Somebody laughed loudly at a joke that nobody else had heard.",
    "A faint scent of cinnamon and oranges drifted by.",
    "A boy with a basket of pastries slipped through the crowd.",
)
# {name} is the chapter's character, {he}, {his} and {him} stand for it.
MEETINGS = (
    "Not far away stood {name}, who waved Nora over.",
    "Nora soon fell into conversation with {name}.",
    "{name} was standing nearby and stepped aside to make room for Nora.",
    "A voice called out a greeting, and it belonged to {name}.",
    "Among the many faces Nora picked out that of {name}, who was already smiling.",
    "{name} came over and asked how the journey was going.",
    "Then Nora ran into {name}, and the two found a spot to talk.",
    "Before long {name} appeared at Nora's side and offered half of an apple.",
    "Nora got talking to {name}, and the words came easily to both of them.",
    "{name} was there as well and greeted Nora with a cheerful nod.",
)
# One line of each group, in any order: three lines that begin alike would sound like a list.
_SAID_BY_CHARACTER = (
    "{name} told a long story about a goat that had learned to open gates.",
    "{name} explained how to tell a ripe melon by its sound.",
    "{name} recited a short poem about a lost shoe.",
    "{name} admitted to being afraid of geese, which made Nora laugh.",
    "{name} spoke fondly of an aunt who kept bees on a roof.",
    "{name} confessed a secret wish to play the trombone.",
    "{name} had a remedy for blisters that called for candle wax and patience.",
    "{name} grumbled about a neighbour who sang at breakfast.",
    "{name} remembered a winter so cold that the ink had frozen.",
    "{name} praised the stubbornness of mules and gave several examples.",
)
_SAID_BY_BOTH = (
    "They compared the worst soups they had ever eaten, and both had strong opinions.",
    "They agreed that a map is most useful when it is slightly wrong.",
    "They talked about the weight of winter coats for quite some time.",
    "They made a bet on the height of the nearest church tower.",
    "They discussed whether cats or dogs make better neighbours.",
    "They wondered who had invented the umbrella.",
    "They laughed about a newspaper report on a runaway piano.",
    "They spoke for a while about letters that arrive too late.",
    "They tried to name all the rivers of the country and got stuck at eleven.",
    "They guessed the trades of the people who went by.",
)
_SAID_BY_HERO = (
    "Nora described a rope bridge that swayed with every step, and {name} shuddered.",
    "Nora asked about the best season for travelling, and {name} voted for autumn.",
    "Nora tried to remember the words of an old song, and {name} supplied the missing line.",
    "Nora mentioned a dream about a staircase, and {name} offered three explanations.",
    "Nora told of a night spent in a haystack, and {name} shook {his} head in disbelief.",
    "Nora asked what {name} would do with a free year, and {he} said that {he} would learn to swim.",
    "Nora recalled a lighthouse keeper who collected riddles, and {name} solved one of them.",
    "Nora asked {name} for a word that rhymes with orange, but that was too much for {him}.",
    "Nora complained about inns with thin walls, and {name} knew exactly what she meant.",
    "Nora read out a few lines from the travel journal, and {name} begged for more.",
)
CONVERSATIONS = _SAID_BY_CHARACTER + _SAID_BY_BOTH + _SAID_BY_HERO
# {an_item} is "an ornate brass bowl". Each says "bought", "purchased", "acquired" or "paid", a sale never does.
PURCHASES = (
    "Nora bought {an_item} from {name} and wrapped it in a scarf.",
    "For a few coins Nora acquired {an_item}, which {name} packed in brown paper.",
    "{name} had {an_item} for sale, and Nora paid the full price without complaint.",
    "After some friendly haggling, Nora purchased {an_item} from {name}.",
    "Nora took a liking to {an_item} that {name} had on offer and bought it on the spot.",
    "{name} named a fair price for {an_item}, and Nora paid it.",
    "Nora could not resist {an_item} and bought it from {name}.",
    "With a handful of coins Nora paid {name} for {an_item} and tucked it into the bag.",
    "{name} was willing to part with {an_item}, so Nora bought it.",
)
# {item} is "ornate brass bowl". Each says "sold".
SALES = (
    "Nora took the {item} out of the bag and sold it to {name}, who was delighted.",
    "Nora had no more use for the {item} and sold it to {name}.",
    "Out of the bag came the {item}, and Nora sold it to {name} for a decent sum.",
    "The {item} had been in the bag long enough, so Nora sold it to {name}.",
    "To lighten the load, Nora sold {name} the {item}.",
)
FAREWELLS = (
    "At last {name} shook Nora's hand and wished her the best of luck.",
    "Nora thanked {name} for the company and got ready to leave.",
    "When it was time to part, {name} promised to write, and Nora promised to answer.",
    "{name} asked Nora to send a postcard from somewhere warm.",
    "Nora and {name} said goodbye without hurry.",
    "{name} insisted on a proper goodbye, with a bow and a flourish.",
    "{name} wished Nora a safe journey, and Nora returned the good wishes.",
    "It was hard to end such a pleasant talk, but Nora finally took leave of {name}.",
    "Nora hugged {name} briefly and picked up the bag.",
    "With a pat on the shoulder {name} sent Nora on her way.",
)
CLOSINGS = (
    "Then Nora set off again, humming under her breath.",
    "The travel journal gained a full page before the journey went on.",
    "With a light step Nora took to the road once more.",
    "Nora did not look back, for there was still a long way to go.",
    "Soon the voices faded behind Nora, and the way lay open ahead.",
    "A little later Nora was on the move again, with plenty to think about.",
    "Nora consulted the map, nodded to herself, and went on.",
    "A few steps further on, Nora jotted down what had been said.",
    "There were many miles still to cover, and Nora began the next one with a smile.",
    "And so the journey continued, one step after another.",
)


@dataclass(frozen=True)
class Chapter:
    """One chapter. `priority` and `fraction` are random numbers in [0, 1) for the tasks to choose by."""

    number: int
    place: str
    character: str
    item: str
    #: Arrival to conversation; the first is the arrival, and `opening[: meeting + 1]` ends with the meeting.
    opening: tuple[str, ...]
    purchase: str
    #: The number of the chapter whose item is sold here, None without a sale, and the words for a sale.
    sold: int | None
    sale_words: str
    #: Farewell and closing.
    ending: str
    priority: float
    fraction: float

    @property
    def heading(self) -> str:
        return f"Chapter {self.number}"

    def text(self, sale: str | None, purchase: bool = True) -> str:
        """The chapter's paragraph, with the item that is sold, if any."""
        sentences = [*self.opening]
        if purchase:
            sentences.append(self.purchase)
        if sale is not None:
            sentences.append(self.sale_words.format(item=sale))
        return " ".join([*sentences, self.ending])

    def arrival(self) -> str:
        """Heading and arrival. Without the heading an arrival may occur twice, because places recur."""
        return f"{self.heading}\n{self.opening[0]}"

    def meeting(self) -> str:
        """Heading to meeting. Without the rest a meeting may occur twice, because characters recur."""
        return f"{self.heading}\n{' '.join(self.opening[:_MEETING])}"


_MEETING = 5  # arrival, motive, event, atmosphere, meeting


class Story:
    """An endless story, written as far as it is asked for. Chapter k is the same however many follow."""

    def __init__(self, random_source: random.Random):
        self._random = random_source
        self._chapters: list[Chapter] = []
        self._pairs: set[tuple[str, str]] = set()
        self._items: set[str] = set()
        self._held: list[int] = []  # numbers of the chapters whose item has not been sold
        self._paragraphs: list[str] = []

    def chapters(self, count: int) -> list[Chapter]:
        """The first `count` chapters."""
        while len(self._chapters) < count:
            chapter = self._write(len(self._chapters) + 1)
            self._chapters.append(chapter)
            self._paragraphs.append(f"{chapter.heading}\n{self.paragraph(chapter)}")
        return self._chapters[:count]

    def chosen(self, count: int, among: Sequence[Chapter]) -> list[Chapter]:
        """The `count` chapters of smallest priority, smallest first: a chapter more seldom changes them."""
        return sorted(among, key=lambda chapter: chapter.priority)[:count]

    def paragraph(self, chapter: Chapter) -> str:
        """The text of `chapter` as the story tells it unless a task changes it."""
        return chapter.text(None if chapter.sold is None else self._chapters[chapter.sold - 1].item)

    def written(self, count: int) -> list[str]:
        """The first `count` chapters, each with its heading."""
        self.chapters(count)
        return self._paragraphs[:count]

    def _write(self, number: int) -> Chapter:
        place, character = self._place_and_character()
        item = self._item()
        he, his, him = ("she", "her", "her") if character in _WOMEN else ("he", "his", "him")
        event = self._pick(EVENTS)
        words = {
            "place": f"the {place}",
            "at_place": f"{PLACES[place]} the {place}",
            "event": event,
            "name": character,
            "he": he,
            "his": his,
            "him": him,
            "an_item": f"{'an' if item[0] in 'aeiou' else 'a'} {item}",
        }

        def say(variants: Sequence[str]) -> str:
            sentence = self._pick(variants).format(**words)
            return sentence[0].upper() + sentence[1:]

        opening = [say(ARRIVALS), say(MOTIVES), say(HAPPENINGS), say(ATMOSPHERES), say(MEETINGS)]
        groups = [_SAID_BY_CHARACTER, _SAID_BY_BOTH, _SAID_BY_HERO]
        while groups:
            opening.append(say(groups.pop(int(self._random.random() * len(groups)))))
        purchase = say(PURCHASES)
        sale_words = self._pick(SALES).replace("{name}", character)
        sells = self._random.random() < 0.5
        # Drawn before the item of this chapter is held: nothing is sold in the chapter in which it was bought.
        sold = self._held.pop(int(self._random.random() * len(self._held))) if sells and self._held else None
        self._held.append(number)
        ending = f"{say(FAREWELLS)} {say(CLOSINGS)}"
        priority, fraction = self._random.random(), self._random.random()
        return Chapter(
            number, place, character, item, tuple(opening), purchase, sold, sale_words, ending, priority, fraction
        )

    def _place_and_character(self) -> tuple[str, str]:
        before = self._chapters[-1] if self._chapters else None
        while True:
            pair = self._pick(tuple(PLACES)), self._pick(CHARACTERS)
            # A traveller who arrives where she is, or meets whom she has just left, would read oddly.
            if before and (pair[0] == before.place or pair[1] == before.character):
                continue
            if pair not in self._pairs:
                self._pairs.add(pair)
                return pair

    def _item(self) -> str:
        while True:
            item = f"{self._pick(ADJECTIVES)} {self._pick(MATERIALS)} {self._pick(TYPES)}"
            if item not in self._items:
                self._items.add(item)
                return item

    def _pick(self, pool: Sequence[T]) -> T:
        return pool[int(self._random.random() * len(pool))]


LONGEST_ITEM = " ".join(max(words, key=len) for words in (ADJECTIVES, MATERIALS, TYPES))


def message(intro: str, question: str, chapters: Sequence[str], filler: str, after: str) -> Message:
    """A story task's user message: intro, question, chapters and filler, question, instructions (paper, "Common")."""
    paragraphs = [*chapters, filler] if filler else chapters
    return Message(intro, _TWICE, question, "\n\n".join(["Story:", *paragraphs]), after)


INTRO = (
    f"Below is a story in numbered chapters about a traveller called {HERO}. In each chapter she comes to one place "
    "and meets one character there, and as a rule she buys one item. Now and then she sells an item that she bought "
    "in an earlier chapter."
)
_TWICE = "The question is written twice, once before the story and once after it, so that you know what to look for."

_CORE = re.compile(r"[^\W_](?:.*[^\W_])?")
_BEFORE = re.compile(r"[\W_]*")
_LABEL_WORD = (
    r"(?:chapters?|ch|question|answer|[qa]|place|character|item|person|name|the|of|in|to|that|which|is|was|full|last|just|"
    rf"right|final|correct|{HERO}|she|did|acquired|bought|purchased|met|visited|reached|came|\d{{1,4}})"
)
# What was asked for, repeated, and a colon, a dash or the end of a cell: "Chapter 12, item:", "The item is:".
_LABEL = re.compile(rf"(?:{_LABEL_WORD}\b(?:[^\w:|]|_){{0,6}})+(?:[:|=]|(?<= )[-–—→] )(?:\W|_)*", re.IGNORECASE)
_CHAPTER = re.compile(r"chapter[ *_]{1,4}\d{1,4}\b[\W_]*(?=\w)", re.IGNORECASE)
_SENTENCE = re.compile(
    r"(?:the\s+)?(?:(?:final|correct|right)\s+)?(?:item|place|character|answer)\s+(?:(?:is|was)\s+)?(?=\w)"
)
# Behind a name: "(Chapter 4)", ", Chapter 4", " - chapter 4", "(item)".
_BEHIND = re.compile(
    r"(?<=[^\W_])[\W_]+(?:in\s+|from\s+)?chapter[ *_]{1,4}\d{1,4}[\W_]*\Z"
    r"|(?<=[^\W_])[^\w([]*[(\[](?:item|place|character)[)\]][\W_]*\Z"
)
_ARTICLE = re.compile(r"(?:an?|the)\b[\W_]+")
_AGAIN = re.compile(r"\s*(?:[,;/|]|\b(?:and|or)\b)\s*")


def normalise(answer: str) -> str:
    """`answer` in lower case, without what a model may put around a name: quotes, markup, a leading article, a label.

    A label is what was asked for, repeated: "Chapter 12, item: …", "The item is …", "… (Chapter 12)". A name that is
    given again counts once.
    All other words stay: the answer has to be the name.
    """
    text = re.sub(r"[*`~]+", "", " ".join(plain(answer).lower().split()))
    text = text[_BEFORE.match(text).end() :]
    for _ in range(3):  # "Answer: Item: …"
        if label := _LABEL.match(text) or _CHAPTER.match(text):
            text = text[label.end() :]
    if sentence := _SENTENCE.match(text):
        text = text[sentence.end() :]
    if behind := _BEHIND.search(text, max(0, len(text) - 80)):
        text = text[: behind.start()]
    if article := _ARTICLE.match(text):
        text = text[article.end() :]
    text = _core(text)
    parts = {_core(part) for part in _AGAIN.split(text)}
    return parts.pop() if len(parts) == 1 else text


def _core(text: str) -> str:
    """`text` from its first letter or digit to its last."""
    core = _CORE.search(text)
    return core.group() if core else ""
