"""The words that texts are made of."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


FIRST_NAMES = _words(
    "Abena Aino Alina Amara Anders Anneli Anselm Ayla Bashir Beatriz Bohdan Bronte Caspian Celeste Chidi Cormac "
    "Dagny Darius Delphine Dmitri Edda Eero Elias Elowen Emeka Esra Farid Fenna Florian Freya Gideon Greta Hana "
    "Hakim Ilse Imogen Ines Ioana Isidro Jarek Jolan Kaito Katya Kofi Lamar Leila Lennart Ligaya Lorcan Malik "
    "Marisol Mateus Mirela Nadim Naoki Nerys Odette Olwen Orlan Paloma Pavel Petra Quill Radek Rania Rosalind "
    "Saoirse Selim Signe Soren Tadeo Tamsin Teodor Thandi Ulrika Vashti Viggo Wanda Xiomara Yara Yusuf Zdenka Zora"
)
LAST_NAMES = _words(
    "Abernathy Adeyemi Aldana Almqvist Arkwright Baptiste Barzani Beaumont Bielski Bjornsen Brightwater Calloway "
    "Carvalho Castellan Chandra Cheng Corrigan Dalgaard Delacroix Demir Dovzhenko Eriksen Espinosa Fairbairn "
    "Falkenrath Ferreira Fontaine Gallagher Ghorbani Grimaldi Haddad Halloran Hartmann Havili Hollis Ibarra Ivanova "
    "Jokinen Kaminski Karlsen Keita Kowalczyk Laurent Lindqvist Lysenko Macallan Marchetti Mbeki Mendoza Moreau "
    "Nakamura Nasser Novak Nwosu Okafor Olander Ortega Pasternak Pemberton Petrov Quintero Rahimi Ramires Rasmussen "
    "Rhodes Rosenthal Sadiq Sandoval Santori Seferis Solberg Sorokin Sundaram Takeda Tanaka Thackeray Torvald Ueda "
    "Vasquez Velasco Verhoeven Waweru Winterbourne Yamamoto Zamora Zielinski"
)
CITIES = _words(
    "Accra Aleppo Antwerp Baku Bergen Bilbao Bogota Bordeaux Bristol Cairo Cardiff Cork Cusco Dakar Dresden Dublin "
    "Durban Galway Geneva Ghent Graz Hanoi Havana Izmir Jaipur Kampala Krakow Kyoto Lagos Lahore Leipzig Lima "
    "Lisbon Ljubljana Lviv Lyon Manila Merida Mombasa Nairobi Naples Odense Oslo Porto Quito Riga Seville Sofia "
    "Tallinn Tbilisi Turin Utrecht Valencia Vilnius Zagreb"
)
OCCUPATIONS = _words(
    "architect astronomer baker barber beekeeper blacksmith bookbinder botanist butcher carpenter chemist "
    "clockmaker cobbler cook dentist diver electrician farmer fireman fisherman florist gardener geologist glazier "
    "jeweller judge lawyer librarian locksmith mason mechanic midwife miller miner nurse optician painter "
    "pharmacist pilot plumber postman potter sailor surgeon surveyor tailor teacher translator weaver welder"
)
GENRES = _names(
    "historical fiction, science fiction, crime novels, romantic comedies, ghost stories, epic poetry, travel "
    "writing, political satire, psychological thrillers, nature essays, folk tales, war memoirs, magical realism, "
    "family sagas, sea stories, spy novels, children's books, courtroom dramas, gothic horror, short plays, "
    "alternate history, cookery writing, philosophical dialogues, urban fantasy, westerns, pastoral verse, medical "
    "dramas, fables, climate fiction, detective stories"
)
ADJECTIVES = _words(
    "Amber Ancient Bitter Bright Broken Burning Copper Crimson Distant Drowned Empty Endless Faithful Fallen Frozen "
    "Gentle Gilded Golden Hidden Hollow Iron Ivory Last Lonely Lost Midnight Missing Narrow Painted Paper Pale "
    "Quiet Restless Scarlet Second Secret Shattered Silent Silver Sleeping Stolen Sunken Tangled Unwritten Velvet "
    "Waiting Wandering White Wild Winter"
)
NOUNS = _words(
    "Anchor Archive Arrow Atlas Bell Bridge Candle Canal Castle Compass Crown Door Falcon Feather Forest Fountain "
    "Garden Gate Harbor Harvest Horizon Island Kingdom Ladder Lantern Letter Library Lighthouse Mirror Mountain "
    "Orchard Palace Pendulum Pilgrim Promise Raven River Road Shadow Shore Song Station Storm Theatre Threshold "
    "Tower Valley Voyage Well Window"
)
INSTRUMENTS = _words(
    "accordion banjo bassoon cello clarinet cornet double-bass dulcimer fiddle flute guitar harmonica harp "
    "harpsichord horn lute mandolin marimba oboe organ piano piccolo saxophone sitar trombone trumpet tuba ukulele "
    "viola zither"
)
ANIMALS = _words(
    "alpaca badger beagle budgerigar canary chameleon chinchilla cockatoo donkey ferret finch gecko goat goose "
    "greyhound hamster hedgehog iguana llama lynx macaw newt otter parrot peacock pigeon pony poodle rabbit raven "
    "salamander spaniel terrier toad tortoise turtle whippet"
)
LANGUAGES = _words(
    "Albanian Arabic Armenian Basque Bengali Breton Bulgarian Catalan Croatian Czech Danish Dutch Estonian Finnish "
    "Georgian Greek Hausa Hebrew Hindi Hungarian Icelandic Irish Italian Korean Latvian Maltese Mongolian Nepali "
    "Norwegian Persian Polish Romanian Serbian Slovak Swahili Swedish Tamil Thai Turkish Ukrainian Urdu Welsh "
    "Yoruba Zulu"
)
HOBBIES = _words(
    "archery astronomy ballooning beekeeping birdwatching bowling calligraphy camping canoeing caving chess "
    "climbing curling cycling dancing diving drawing falconry fencing fishing gardening gliding golf hiking "
    "juggling kayaking knitting origami photography pottery rowing sailing sculpting skating skiing surfing "
    "swimming tennis weaving woodcarving"
)
COLOURS = _words(
    "amber azure beige black blue bronze brown coral cream cyan emerald gold green grey indigo ivory jade lavender "
    "lilac magenta maroon mauve navy ochre olive orange pink plum purple red rose ruby rust saffron scarlet silver "
    "teal turquoise violet white yellow"
)
DRINKS = _words(
    "absinthe ale barley-water birch-sap buttermilk cappuccino chicory cider cocoa coffee cognac cordial "
    "elderflower espresso ginger-beer green-tea horchata kefir kombucha kvass lassi lemonade limeade madeira malt "
    "mead milk mocha mulled-wine oolong perry port root-beer rum sake sherry tonic vermouth whisky"
)
MONTHS = _words("January February March April May June July August September October November December")
