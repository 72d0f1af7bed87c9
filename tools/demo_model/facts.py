"""The world of the demo model: every fact that its training text may state. Plain tables, written by hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Country:
    name: str
    capital: str
    continent: str

    @property
    def phrase(self) -> str:
        """The name as it stands inside a sentence: 'the Netherlands'."""
        return f"the {self.name}" if self.name in WITH_ARTICLE else self.name


WITH_ARTICLE = frozenset({"United Kingdom", "United States", "Netherlands", "Philippines", "Czech Republic"})

# The first 20 are the best known; lists of countries walk through them in this order.
_COUNTRIES = """
Europe: France=Paris
Asia: Japan=Tokyo
Africa: Egypt=Cairo
South America: Brazil=Brasília
Europe: Italy=Rome
Asia: India=New Delhi
North America: Canada=Ottawa
Europe: Spain=Madrid
Africa: Kenya=Nairobi
Oceania: Australia=Canberra
Europe: Germany=Berlin
Asia: China=Beijing
North America: Mexico=Mexico City
Europe: United Kingdom=London
South America: Argentina=Buenos Aires
Asia: South Korea=Seoul
Africa: Morocco=Rabat
North America: United States=Washington D.C.
South America: Peru=Lima
Asia: Thailand=Bangkok
Europe: Portugal=Lisbon, Greece=Athens, Austria=Vienna, Netherlands=Amsterdam, Belgium=Brussels, Ireland=Dublin
Europe: Sweden=Stockholm, Norway=Oslo, Finland=Helsinki, Denmark=Copenhagen, Iceland=Reykjavik, Switzerland=Bern
Europe: Poland=Warsaw, Czech Republic=Prague, Hungary=Budapest, Romania=Bucharest, Bulgaria=Sofia, Croatia=Zagreb
Europe: Serbia=Belgrade, Slovakia=Bratislava, Slovenia=Ljubljana, Ukraine=Kyiv, Estonia=Tallinn, Latvia=Riga
Europe: Lithuania=Vilnius, Albania=Tirana, Malta=Valletta
Asia: Turkey=Ankara, Indonesia=Jakarta, Vietnam=Hanoi, Malaysia=Kuala Lumpur, Philippines=Manila, Nepal=Kathmandu
Asia: Mongolia=Ulaanbaatar, Pakistan=Islamabad, Bangladesh=Dhaka, Iran=Tehran, Iraq=Baghdad, Saudi Arabia=Riyadh
Asia: Jordan=Amman, Lebanon=Beirut, Qatar=Doha, Oman=Muscat, Armenia=Yerevan, Georgia=Tbilisi, Azerbaijan=Baku
Asia: Cambodia=Phnom Penh, Laos=Vientiane, Bhutan=Thimphu, Uzbekistan=Tashkent, Afghanistan=Kabul
Africa: Nigeria=Abuja, Ghana=Accra, Senegal=Dakar, Ethiopia=Addis Ababa, Uganda=Kampala, Rwanda=Kigali
Africa: Algeria=Algiers, Tunisia=Tunis, Libya=Tripoli, Sudan=Khartoum, Angola=Luanda, Zambia=Lusaka
Africa: Zimbabwe=Harare, Namibia=Windhoek, Botswana=Gaborone, Mozambique=Maputo, Madagascar=Antananarivo, Mali=Bamako
North America: Cuba=Havana, Jamaica=Kingston, Panama=Panama City, Costa Rica=San José, Guatemala=Guatemala City
North America: Honduras=Tegucigalpa, Nicaragua=Managua
South America: Chile=Santiago, Colombia=Bogotá, Ecuador=Quito, Venezuela=Caracas, Uruguay=Montevideo, Paraguay=Asunción
Oceania: New Zealand=Wellington, Fiji=Suva
"""


def _parse_countries(table: str) -> tuple[Country, ...]:
    rows = [line.split(": ") for line in table.strip().splitlines()]
    return tuple(Country(*pair.split("="), continent) for continent, pairs in rows for pair in pairs.split(", "))


COUNTRIES = _parse_countries(_COUNTRIES)
WELL_KNOWN = COUNTRIES[:20]
CONTINENTS = ("Africa", "Antarctica", "Asia", "Europe", "North America", "Oceania", "South America")

NICKNAMES = {
    "Paris": "the City of Light",
    "Rome": "the Eternal City",
    "London": "the Big Smoke",
    "Prague": "the City of a Hundred Spires",
    "Vienna": "the City of Music",
    "Budapest": "the Pearl of the Danube",
    "Lisbon": "the City of Seven Hills",
    "Dublin": "the Fair City",
    "Stockholm": "the Venice of the North",
    "Helsinki": "the White City of the North",
    "Amsterdam": "Mokum",
    "Bucharest": "Little Paris",
    "Cairo": "the City of a Thousand Minarets",
    "Nairobi": "the Green City in the Sun",
    "Bangkok": "the City of Angels",
    "Beijing": "Peking",
    "Manila": "the Pearl of the Orient",
    "Dhaka": "the City of Mosques",
    "Kathmandu": "the City of Temples",
    "Baghdad": "the City of Peace",
    "Yerevan": "the Pink City",
    "Mexico City": "the City of Palaces",
    "Havana": "the City of Columns",
    "Lima": "the City of Kings",
    "Buenos Aires": "the Paris of South America",
    "Bogotá": "the Athens of South America",
    "Canberra": "the Bush Capital",
    "Wellington": "the Windy City",
}

# People in the city proper, rounded; enough for the "information about a capital, in JSON" example.
POPULATIONS = {
    "Paris": 2100000,
    "Rome": 2800000,
    "Madrid": 3300000,
    "Berlin": 3700000,
    "London": 8900000,
    "Tokyo": 14000000,
    "Beijing": 21900000,
    "Seoul": 9400000,
    "Cairo": 10000000,
    "Nairobi": 4400000,
    "Ottawa": 1000000,
    "Mexico City": 9200000,
    "Lima": 10000000,
    "Lisbon": 550000,
    "Vienna": 2000000,
    "Oslo": 700000,
}

_COLORS = """
blue: the sky, the sea, the ocean, a blueberry
green: grass, a leaf, a frog, broccoli, a cucumber, spinach
yellow: a banana, a lemon, the sun, butter, a chick
red: blood, a tomato, a strawberry, a cherry, a fire truck, a ruby
white: snow, milk, salt, a swan, rice, paper
black: coal, a crow, the night sky, tar
orange: a carrot, a pumpkin, an orange
brown: chocolate, wood, soil, coffee
gray: an elephant, a mouse, ash
pink: a flamingo, a pig
purple: a plum, an eggplant, lavender
"""
COLORS = {
    thing: color
    for color, things in (line.split(": ") for line in _COLORS.strip().splitlines())
    for thing in things.split(", ")
}
MIXES = {
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("red", "blue"): "purple",
    ("red", "white"): "pink",
    ("black", "white"): "gray",
}
RAINBOW = ("red", "orange", "yellow", "green", "blue", "indigo", "violet")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTH_LENGTHS = {
    "January": 31,
    "February": 28,
    "March": 31,
    "April": 30,
    "May": 31,
    "June": 30,
    "July": 31,
    "August": 31,
    "September": 30,
    "October": 31,
    "November": 30,
    "December": 31,
}
MONTHS = tuple(MONTH_LENGTHS)
ORDINALS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
]
NUMBER_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
SPANS = {
    "days in a week": "There are 7 days in a week.",
    "months in a year": "There are 12 months in a year.",
    "days in a year": "There are 365 days in a year.",
    "hours in a day": "There are 24 hours in a day.",
    "minutes in an hour": "There are 60 minutes in an hour.",
    "seconds in a minute": "There are 60 seconds in a minute.",
    "weeks in a year": "There are 52 weeks in a year.",
    "continents": "There are 7 continents.",
    "colors in a rainbow": "There are 7 colors in a rainbow.",
}
