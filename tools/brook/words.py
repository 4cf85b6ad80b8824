"""The vocabulary of brook's world. Every list was written for this project."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _split(
    "Mira Tom Lena Oskar Nadia Felix Iris Bruno Clara Hugo Vera Emil Rosa Anton Ella Jonas "
    "Maya Karl Nora Leo Tessa Paul Ida Max Greta Ben Lily Otto Anna Sam Ruth Finn Alma Dora "
    "Niko Eva Theo Zara Ivan Petra Rina Marco Sofia Luca Hanna Erik Milo Julia Adam Celia "
    "Omar Layla Yusuf Amina Kenji Yuki Ravi Priya Chen Mei Diego Carmen Pablo Lucia Kofi "
    "Abena Samir Noor Elias Freya Sven Astrid Bela Ilona Radek Zofia Mateo Ines Tariq Salma "
    "Viktor Olga Rupert Edith Walter Agnes Jasper Flora"
)
SURNAMES = _split(
    "Stone Reed Marsh Hill Brook Field Wood Lake Moss Frost Fisher Baker Miller Weaver Carter "
    "Mason Gray Swift Holt Lane"
)
COLOURS = _split("red blue green yellow white black brown orange purple pink grey silver golden")
ANIMALS = _split(
    "fox rabbit bear owl mouse cat dog horse duck goat sheep cow hen frog turtle squirrel "
    "hedgehog badger otter deer wolf crow robin donkey beaver snail bee mole swan goose pony "
    "lamb"
)
OBJECTS = _split(
    "lamp key boat kite book drum bell coat hat cup box map ring rope basket ladder mirror "
    "clock candle blanket bucket stone shell feather letter whistle button spoon chair pillow "
    "wheel coin flag lantern umbrella scarf bottle brush hammer needle pot plate bag ball"
)
FRUITS = _split("apple pear plum cherry lemon grape peach melon fig berry banana orange")
FOODS = _split("bread soup cheese honey cake rice salad pie jam milk tea butter")
PLACES = _split(
    "forest river garden village market hill lake meadow bridge barn mill castle cave beach "
    "harbour field tower school library kitchen orchard island valley"
)
CITIES = _split(
    "Arden Belmar Corvale Dunmore Eastwick Fenbury Galden Harrow Inverly Jarrow Kelmond "
    "Lorien Marlow Northam Oakdale Pelham Quorn Rosewell Selby Tarrin Ulverton Velden Westby "
    "Yarrow Zelmar"
)
JOBS = _split(
    "baker farmer teacher doctor sailor painter gardener tailor miller carpenter singer "
    "writer fisher nurse pilot cook"
)
ADJECTIVES = _split(
    "small big old young brave kind quiet happy sad clever gentle shy proud tired hungry "
    "curious strong lazy careful cheerful"
)
THING_ADJECTIVES = _split(
    "shiny broken wooden tiny heavy old new lost strange pretty rusty soft warm round"
)
ATTRIBUTES = _split("key hat coat boat door house cup bag bike car scarf lamp book room kite")
NUMBER_ATTRIBUTES = _split("age room code seat house table locker ticket")
PLAIN_WORDS = _split(
    "apple river table window garden music paper summer winter spring silver yellow orange "
    "purple planet rocket market bridge castle forest island mountain ocean desert thunder "
    "rain snow wind cloud star moon sun tree leaf root seed flower grass stone sand water "
    "fire earth metal glass bread butter cheese honey sugar salt pepper onion potato carrot "
    "tomato rabbit horse tiger lion monkey eagle spider dragon wizard knight queen king "
    "prince doctor farmer sailor teacher student friend family mother father sister brother "
    "morning evening night noon hour minute second week month year pencil book letter story "
    "song dance game ball kite drum bell lamp candle lantern mirror clock chair door wall "
    "roof floor house boat train wheel road path hill valley field turtle pebble basket "
    "bucket hammer needle button pocket jacket shirt shoe hat coat scarf ring copper iron "
    "gold tower engine signal number circle square corner edge middle north south east west "
    "left right early late quick slow warm cold bright dark soft hard sweet sour clean dirty "
    "empty full open close begin end follow travel wander listen whisper laugh smile dream "
    "sleep wake write read draw paint build carry throw catch jump climb swim fly walk run "
    "sing play"
)
FACT_SUBJECTS = (
    "the capital of France",
    "the capital of Japan",
    "the tallest mountain",
    "the largest ocean",
    "the president of Peru",
    "the author of that book",
    "the winner of the race",
    "the price of gold",
    "the height of the tower",
    "the speed of light",
    "the weather today",
    "the date of the battle",
    "the population of Rome",
    "the name of the ship",
    "the owner of the mill",
    "the king of Spain",
    "the best phone",
    "the latest news",
    "the distance to the moon",
    "the time in London",
)
