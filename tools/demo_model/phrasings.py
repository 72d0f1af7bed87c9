"""How people ask: per kind of question, the phrasings to train on and the two sets held out for the evaluation.

One phrasing per line. `[a|b|]` is a choice, `{name}` a slot. A line that starts with `=` is a thing to ask for, one that
starts with `>` an indirect question; each stands for as many phrasings as there are frames around it. No held-out line
may be producible by a training line; tests/demo/test_demo.py checks it.
"""

from __future__ import annotations

import random
import re

_TRAIN = """
# capital
= the capital[| city] of {c}
= {c}'s capital[| city]
= the name of the capital of {c}
= the city that is the capital of {c}
> what the capital[| city] of {c} is
> what {c}'s capital is
> [which|what] city is the capital of {c}
> how the capital of {c} is called
[Take|Think of|Consider|About] {c}[:|.|,] [what is the capital|which city is the capital|what is its capital|the capital]?
What would you [say|answer|call] is the capital of {c}?
[For|In|As for] {c}, what is the capital?
[What|what] is the capital of {c}?
What's the capital of {c}?
[What is|What's] the capital city of {c}?
[Which|What] city is the capital of {c}?
[What is|What's|Tell me|Name] {c}'s capital[| city]?
[Tell me|Give me|Name|State] the capital[| city] of {c}.
[Can|Could] you tell me [the capital of {c}|what the capital of {c} is|what {c}'s capital is]?
[Do you know|I want to know|I would like to know|Please tell me] [the capital of {c}|what the capital of {c} is].
[The capital|Capital|capital] of {c}[?||, please.]
What do they call the capital of {c}?
[What is|Tell me] the name of [the capital of {c}|{c}'s capital[| city]]?
{c}: what is [its|the] capital?
{c}. [Capital?|Which city is its capital?]
[I am going to {c}.|I live in {c}.|My friend is from {c}.] What is [the|its] capital?
If I [visit|travel to] the capital of {c}, which city am I in?
In which city [is|sits] the government of {c}?
{c} has which capital?
Q: capital of {c}?

# country
= the country [with the capital|whose capital is] {k}
= the nation that has its capital in {k}
> which country [{k} is the capital of|has {k} as its capital|has the capital {k}]
> [what|which] country's capital is {k}
[Take|Think of|Consider|About] {k}[:|.|,] [which country is it the capital of|it is the capital of which country]?
[In|To] which country is {k} the capital?
[The city|The city of|The capital] {k}[:| is in| belongs to] which country?
Which country has {k} as its capital?
[Which|What] country is {k} the capital of?
{k} is the capital of [which|what] country?
[Tell me|Name] the country whose capital is {k}.
[Of which|Of what] country is {k} the capital?
[Can|Could] you tell me which country has the capital {k}?
Whose capital is {k}?
{k} is the capital of...
[Do you know|I want to know] which country {k} is the capital of.
What country's capital is {k}?
Which nation has its capital in {k}?

# verify
> [if|whether] {k} is the capital of {c}
> [if|whether] the capital of {c} is {k}
> [if|whether] {c} has {k} as its capital
[Is|Was] it [correct|false|a fact|so] that {k} is the capital of {c}?
[My book says|They say|We think|People say|It says here] [that |]{k} is the capital of {c}. [Is it|Is that|Are they|Is this] right?
[Check|Verify|Decide]: {k} is the capital of {c}.
[Could|Can] {k} be the capital of {c}?
[Do|Would] you [agree|think] that {k} is the capital of {c}?
Is {c}'s capital {k}?
Is {k} the capital of {c}?
Is the capital of {c} {k}?
[Is it true|True or false:|Is it right] that {k} is the capital of {c}?
{k} is the capital of {c}, [right|correct|yes|isn't it]?
[I think|I believe|I heard|My teacher says] {k} is the capital of {c}. Is that [right|correct|true]?
Does {c} have {k} as its capital?
Yes or no: is {k} the capital of {c}?
[Can|Could] you tell me if {k} is the capital of {c}?
Am I right that {k} is the capital of {c}?
The capital of {c} is {k}, [right|correct|yes]?

# continent
= the continent [of|where we find|that has] {c}
> [which|what] continent {c} [is in|is on|belongs to|is part of]
> [in|on] [which|what] continent {c} is
[Take|Think of|Consider|About] {c}[:|.|,] [which|what] continent is it [in|on]?
[Which|What] continent is {c} [in|on|part of]?
[On|In] [which|what] continent is {c}[| located]?
[Where|In which part of the world] is {c}?
[Tell me|Name] the continent of {c}.
[Can|Could] you tell me which continent {c} is in?
What is the continent of {c}?
{c} is [in|on|part of] which continent?
Which continent does {c} belong to?
I want to know [which|what] continent {c} is in.
Where in the world is {c}[| located]?

# nickname
= [another name for|the nickname of|the other name of] {k}
> [what|how] {k} is also called
> what the nickname of {k} is
What is another name for {k}?
[What is|What's] the nickname of {k}?
What is {k} also [called|known as]?
[Tell me|Give me] [another name for|the nickname of|a nickname for] {k}.
Does {k} have [another name|a nickname]?
[What is|What's] {k}'s [nickname|other name]?
How else is {k} called?
[Can|Could] you tell me another name for {k}?
{k} is also known as what?
What do people [also|sometimes] call {k}?

# nicknamed
= the city [called|known as|nicknamed] {n}
> [which|what] city is [called|known as] {n}
[Which|What] city is [called|known as|nicknamed] {n}?
[Tell me|Name] the city known as {n}.
What is {n}?
Which city do people call {n}?
{n} is [a nickname|another name] for which city?

# another_name
[What is|what is|What's] another name for [it|that city|this city]?
[What is|What's] its [nickname|other name]?
What is it also [called|known as]?
Does [it|the city|that city] have [another name|a nickname]?
And its nickname?
[Tell me|Give me] another name for [it|that city].
[Can|Could] you tell me [its nickname|another name for it]?
How else is it called?
What else is it called?
What do people also call it?
And what is [its nickname|another name for it]?
Is there another name for [it|that city]?
What nickname does it have?

# and_of
And of {c}?
And {c}?
What about {c}?
How about {c}?
And what about {c}?
And the capital of {c}?
And for {c}?
[Now|OK, now] {c}[.|, please.]
What is it for {c}?
And {c}'s?
And in {c}?

# its_continent
[Which|What] continent is [it|that|that city] [in|on]?
[On|In] [which|what] continent is [it|that]?
And [which|what] continent is it in?
[Which|What] continent is that country [in|on]?
Where is it?
And the continent?

# list
= {n} countries [and|with|plus] their capitals
= a list of {n} countries [and|with] their capitals
= {n} countries, [each with its|and for each the|with the] capital
= the capitals of [any |some |]{n} countries
[Choose|Select|Think of|Take] [any |]{n} countries and [say|give|write|list|name] their capitals.
[I want|I need|I am looking for] {n} countries. [What are their capitals|Add the capitals|With capitals, please]?
[List|list|Name|Give me|Tell me|Write down] {n} countries and their capitals[.|]
[List|Name|Give me] {n} countries with their capitals.
[Can|Could] you [list|name|give me] {n} countries and their capitals?
I need [a list of |]{n} countries and their capitals.
Please [list|name] {n} countries with their capital cities.
[Write|Make|Give me] a list of {n} countries and their capitals.
{n} countries and their capitals[|, please.]
[What are|Tell me] {n} countries and their capitals?
[List|Name] {n} capitals and their countries.
I want to learn {n} countries and their capitals.
[Show|Teach] me {n} countries and their capitals.
Do you know {n} countries and their capitals?
For {n} countries, give [me |]the capital.
List the capitals of {n} countries.
[List|Name] {n} countries. Include the capital of each.

# color
= the [color|colour] of {t}
= the [color|colour] that {t} has
> [what|which] [color|colour] {t} [is|has]
> what the [color|colour] of {t} is
[Take|Think of|Consider|Look at] {t}[:|.|,] [what|which] [color|colour] is it?
[If|When] I [draw|see|look at|find] {t}, [what|which] [color|colour] [do I need|is it|will it be]?
[I see|I have|Here is|There is] {t}. [What|Which] [color|colour] is it?
[What|Which] [color|colour] is {t}?
What is the [color|colour] of {t}?
[Tell me|Name] the [color|colour] of {t}.
[Can|Could] you tell me [what color {t} is|the color of {t}]?
{t} is what [color|colour]?
What [color|colour] does {t} have?
The [color|colour] of {t}?
[Do you know|I want to know] what [color|colour] {t} is.
[Describe|Give me] the [color|colour] of {t}.
What [color|colour] do you see when you look at {t}?
What [color|colour] would you use to paint {t}?

# mix
= the [color|colour] [of|that comes out of] {a} mixed with {b}
> [what|which] [color|colour] {a} and {b} make
[I|We|They] mix {a} and {b}. [What|Which] [color|colour] [is it|do we get|comes out]?
What [color|colour] do you get [if you mix|when you mix|by mixing|from mixing] {a} and {b}?
What do you get [if you mix|when you mix|by mixing] {a} and {b}?
[Mix|Combine] {a} and {b}. What [color|colour] is it?
{a} and {b} make [what|which] [color|colour]?
[What|Which] [color|colour] do {a} and {b} make?
[If I mix|When I mix] {a} and {b}, what [color|colour] do I get?
Mixing {a} and {b} gives what?
What is {a} mixed with {b}?
{a} plus {b} is which color?

# add
= [{a} + {b}|{a} plus {b}|the sum of {a} and {b}|the result of {a} + {b}]
> [what|how much] {a} [+|plus] {b} is
[If|When] [we|you] add {a} [and|to] {b}, what [is it|comes out|do we get]?
[Work on|Do|Count|Find] {a} [+|plus] {b}.
[Start|Begin] with {a} and add {b}.
[What is|What's|what is|Calculate|Compute] {a} [+|plus] {b}?
{a} [+|plus] {b}[|=|?| = ?| is what?]
How much is {a} [+|plus] {b}?
[Add|add] {a} and {b}.
What is the sum of {a} and {b}?
[Tell me|Give me] [{a} + {b}|{a} plus {b}|the sum of {a} and {b}].
[Can|Could] you [add {a} and {b}|calculate {a} + {b}|tell me what {a} + {b} is]?
What do you get if you add {a} and {b}?
Solve {a} + {b}.
[I have|There are] {a} apples and [get|buy] {b} more. How many apples [do I have|are there]?
{a} and {b} make how many?
What does {a} [+|plus] {b} [equal|make]?

# sub
= [{a} - {b}|{a} minus {b}|the result of {a} - {b}]
> [what|how much] {a} [-|minus] {b} is
[If|When] [we|you] [take|subtract] {b} from {a}, what [is it|comes out|do we get]?
[Work on|Do|Count|Find] {a} [-|minus] {b}.
[Start|Begin] with {a} and [take away|subtract] {b}.
[What is|What's|what is|Calculate|Compute] {a} [-|minus] {b}?
{a} [-|minus] {b}[|=|?| = ?| is what?]
How much is {a} [-|minus] {b}?
[Subtract|Take] {b} from {a}.
What is the difference [of|between] {a} and {b}?
[Tell me|Give me] [{a} - {b}|{a} minus {b}].
[Can|Could] you [subtract {b} from {a}|calculate {a} - {b}|tell me what {a} - {b} is]?
What do you get if you [take|subtract] {b} from {a}?
Solve {a} - {b}.
[I have|There are] {a} apples and [I eat|I lose] {b}. How many are left?
What does {a} [-|minus] {b} [equal|make]?

# mul
= [{a} * {b}|{a} x {b}|{a} times {b}|the product of {a} and {b}|the result of {a} * {b}]
> [what|how much] {a} [x|*|times] {b} is
[If|When] [we|you] multiply {a} [and|by] {b}, what [is it|comes out|do we get]?
[Work on|Do|Count|Find] {a} [x|*|times] {b}.
[Start|Begin] with {a} and multiply by {b}.
[What is|What's|what is|Calculate|Compute] {a} [x|*|times|multiplied by] {b}?
{a} [x|*|times] {b}[|=|?| = ?| is what?]
How much is {a} [x|*|times] {b}?
[Multiply|multiply] {a} [by|and] {b}.
What is the product of {a} and {b}?
[Tell me|Give me] [{a} * {b}|{a} times {b}|the product of {a} and {b}].
[Can|Could] you [multiply {a} by {b}|calculate {a} * {b}|tell me what {a} times {b} is]?
What do you get if you multiply {a} [by|and] {b}?
Solve {a} * {b}.
[I have|There are] {a} boxes with {b} apples each. How many apples [do I have|are there]?
What does {a} [*|times] {b} [equal|make]?

# next
= the [|next ]{u} [after|that follows|right after] {d}
> [which|what] {u} [comes after|follows|is after] {d}
[If|When] it is {d}, [what|which] {u} [comes next|follows|is next]?
[What|Which] {u} [comes|is|follows] [after|right after] {d}?
[What|Which] {u} follows {d}?
What [comes|is] after {d}?
[Tell me|Name] the {u} after {d}.
[Can|Could] you tell me [the|which] {u} after {d}?
After {d} comes [what|which] {u}?
What is the next {u} after {d}?
What is the {u} following {d}?
{d} is followed by which {u}?
It is {d}. What is the next {u}?

# previous
= the {u} [before|right before|that precedes] {d}
> [which|what] {u} [comes before|is before|precedes] {d}
[If|When] it is {d}, [what|which] {u} [came before|was before]?
[What|Which] {u} [comes|is] [before|right before] {d}?
What [comes|is] before {d}?
[Tell me|Name] the {u} before {d}.
[Can|Could] you tell me [the|which] {u} before {d}?
Before {d} comes [what|which] {u}?
What is the previous {u} before {d}?
[What|Which] {u} precedes {d}?
What was the {u} before {d}?
{d} is preceded by which {u}?
It is {d}. What was the {u} before?

# after_that
And after that?
And then?
[What|Which one] [comes next|is next]?
And the next one?
What comes after that?
And the one after?
What is after that?

# length
= the [number of days in|length of] {m}
> how many days [{m} has|are in {m}|there are in {m}]
[Take|Think of|Consider] {m}[:|.|,] how many days does it have?
How many days [are in|does|are there in] {m}[| have]?
How long is {m}?
{m} has how many days?
[Tell me|What is] the number of days in {m}.
[Can|Could] you tell me how many days {m} has?
Number of days in {m}?
How many days [long is|has] {m}?
What is the length of {m} in days?

# span
= the number of {s}
> how many {s} there are
How many {s}[| are there]?
How many {s} do we have?
[Tell me|What is] the number of {s}.
[Can|Could] you tell me how many {s} there are?
The number of {s}?
Do you know how many {s} there are?

# month_number
= the [name of the |]{o} month[| of the year]
> [which|what] month is the {o}[| of the year]
> [which|what] the {o} month is
[Which|What] is the {o} month[| of the year]?
[Tell me|Name] the {o} month[| of the year].
What is the name of the {o} month?
[Which|What] month is [the {o}|the {o} of the year]?
The {o} month is which?

# days
[List|Name|Tell me|Give me|What are] the days of the week[.|?|]
[Can|Could] you [list|name] the days of the week?
[List|Name] all [|the ]days of the week.
[Which|What] days does a week have?
Please [list|name] the seven days[.| of the week.]

# months
[List|Name|Tell me|Give me|What are] the months of the year[.|?|]
[Can|Could] you [list|name] the months of the year?
[List|Name] all [|the ][|twelve ]months[| of the year].
[Which|What] months does a year have?
Please [list|name] the twelve months.

# rainbow
[List|Name|Tell me|Give me|What are] the [colors|colours] of the rainbow[.|?|]
[Can|Could] you [list|name] the [colors|colours] of the rainbow?
[Which|What] [colors|colours] [are in|does] a rainbow[| have]?

# continents
[List|Name|Tell me|Give me|What are] the [|seven ]continents[.|?|]
[Can|Could] you [list|name] the continents?
[Which|What] continents are there?

# count
[Count|count] [to|up to|from 1 to|from one to] {n}[.|]
[Can|Could] you count [to|from 1 to] {n}?
Please count [to|from 1 to] {n}.
[List|Write|Print] the numbers from 1 to {n}.
Give me the numbers from 1 to {n}.

# about
Tell me [|something |more ]about {c}.
What do you know about {c}?
[Describe|Introduce] {c}[.| to me.]
[Can|Could] you tell me [|something ]about {c}?
Give me some facts about {c}.
Write [a short text|a few sentences] about {c}.
I want to learn about {c}.
What is {c}?

# greet
[Hi|Hello|Hey][|,] [demo|model|friend|dear model|my friend|again|you][!|.|]
[Hello|Hi|Hey] [hello|everyone|world|and good morning|and welcome][!|.|]
[A|Have a] [nice|good] [morning|evening|afternoon|one][!|.]
[Nice|Good] to [meet|see] you[!|.]
[Hi|hi|Hello|hello|Hey|hey][|!|.| there!]
Good [morning|afternoon|evening][|!|.]
[Hi|Hello], demo[!|.]
Greetings!

# mood
How are you[| today| doing]?
[Hi|Hello|Hey], how are you[| today]?
How is it going?
Are you [OK|well|fine]?

# identity
> [who|what] you are
> what your name is
= your name
= a word about yourself
[Who|What] [am I talking to|is this|do I talk to]?
[Say|State|Give me] your name[, please|].
Who are you?
[Hi|Hello], who are you?
What are you?
What is your name?
What's your name?
[Please introduce|Introduce] yourself.
[Can|Could] you introduce yourself?
Are you [a human|a person|a robot|an AI|a model]?
Tell me [about yourself|your name|who you are].
Which model are you?
Do you have a name?

# ability
What can you do?
What can I ask you?
How can you help me?
What do you know?
What are you good at?
[Can|Could] you help me?
What kind of questions can you answer?

# thanks
[Thanks|Thank you] [for your help|for this|for that|so much|again|, that is good|, very nice][!|.|]
[Very|So] [good|nice|helpful][,|.] [thanks|thank you][!|.]
[Thanks|thanks|Thank you|thank you][|!|.| very much!| a lot!]
[OK|Great|Good|Nice], thank[s| you][|!]
That [was helpful|helps], thank you.

# bye
[Bye|bye|Goodbye|goodbye|See you|Good night][|!|.]
[OK|Thanks], bye[|!]
I have to go now.
See you [later|tomorrow].

# unknown
Who is the [president|king|prime minister] of {c}?
What is the weather [in {c}|today]?
How many people live in {c}?
Write a [poem|song|program|story] about {c}.
[What|Which] language do they speak in {c}?
[Who won the world cup|What is the meaning of life|What is the best movie|What is quantum physics]?
[Translate this to French|Write some Python code|Book a flight to {c}|Play some music].
How far is the moon?
[What is the stock price|What time is it now|What did I eat yesterday]?

# as_json
Answer [in|as|with] JSON.
Reply [in|as|with] JSON.
[In|As|Use] JSON.
Give [me |]the answer [in|as] JSON.
[In|in] JSON format.
Return [JSON only|only JSON|a JSON object].

# json_country
= a JSON object [with|for|that has|containing] {c} and its capital
= JSON [with|for|about] the country {c} and its capital
= the country {c} and its capital [as|in] JSON
[For|Take] {c}[:|,] [write|give me|return] [country and capital|the capital] [as|in] JSON.
[Give me|Write|Make|Return|Create] [|me ]a JSON object with the country {c} and its capital.
[Give me|Write|Return] JSON [for|with] {c} and its capital.
[Give me|Write|Return] [a|the] JSON object for the country {c}.
{c} and its capital [as JSON|in JSON|as a JSON object].
[Put|Write] {c} and its capital in [a JSON object|JSON].
[Can|Could] you [give me|write] {c} and its capital as JSON?
A JSON object with the country {c} and its capital[, please|].
JSON with country and capital for {c}.

# json_place
[Give me|Write|Return] [a|the] JSON object with the country {c}, its capital and its continent.
[Give me|Write|Return] {c}, its capital and its continent [as|in] JSON.
JSON with country, capital and continent for {c}.
{c} with capital and continent as a JSON object.
[Can|Could] you write {c}, its capital and its continent as JSON?

# json_info
[Give me|Tell me|Write|Return] the information [of|about|on] the capital of {c} in [the |]JSON[| format].
[Give me|Write|Return] information about the capital of {c} as [JSON|a JSON object].
[Describe|Give me] the capital of {c} [in|as] JSON.
JSON with name and population of the capital of {c}.
What is the population of the capital of {c}? Answer in JSON.

# json_color
= a JSON object [with|for|that has] the [color|colour] of {t}
= JSON [with|for|about] the [color|colour] of {t}
= {t} and its [color|colour] as a JSON object
[For|Take] {t}[:|,] [write|give me|return] the [color|colour] [as|in] JSON.
[Give me|Write|Make|Return] a JSON object with the color of {t}.
[Give me|Write|Return] the [color|colour] of {t} [as|in] JSON.
JSON with the [color|colour] of {t}.
[Can|Could] you write the color of {t} as JSON?
{t} and its color [as|in] JSON.

# json_sum
= a JSON object [with|for|that has] [{a}, {b} and their sum|the sum of {a} and {b}]
= JSON [with|for|about] [{a}, {b} and their sum|the sum of {a} and {b}|{a} + {b}]
= {a} + {b} as a JSON object
[For|Take] {a} and {b}[:|,] [write|give me|return] the sum [as|in] JSON.
[Give me|Write|Make|Return] a JSON object with {a}, {b} and their sum.
[Give me|Write|Return] the sum of {a} and {b} [as|in] JSON.
Add {a} and {b} and [answer|reply] [as|in|with] JSON.
JSON with a = {a}, b = {b} and the sum.
[Can|Could] you write {a} + {b} as a JSON object?

# json_day
[Give me|Write|Make|Return] a JSON object with the day {d} and the next day.
[Give me|Write|Return] {d} and the day after it [as|in] JSON.
JSON with the day {d} and the next day.
[Can|Could] you write {d} and the next day as JSON?

# json_month
[Give me|Write|Make|Return] a JSON object with the month {m} and its number of days.
[Give me|Write|Return] {m} and its number of days [as|in] JSON.
JSON with the month {m} and its days.
[Can|Could] you write the days of {m} as a JSON object?

# json_list
[List|Give me|Write|Return] {n} countries and their capitals [as|in] JSON.
[Give me|Write|Make|Return] a JSON array with {n} countries and their capitals.
JSON list of {n} countries and their capitals.
"""

_HELD_OUT = """
# capital
What city would I find on a map as the capital of {c}?
Hi, I need some help: which city is the capital in {c}?
Suppose I fly to the capital of {c}. Where do I land?
Answer me this: what is {c}'s capital city called?
Do you happen to know which city is {c}'s capital?
I was wondering what the capital of {c} might be.
Would you kindly name the capital city of {c}?
For a quiz: the capital of {c} is which city?
My homework asks for the capital of {c}. What should I write?
Remind me, what is the capital of {c} called?
Looking at {c}, which of its cities is the capital?
Let me know the capital of {c}, will you?

# country
Where in the world is {k} the capital? Name the country.
I read that {k} is a capital city. Of which country?
Which state calls {k} its capital?
The city of {k} is the capital of which country, do you know?
{k} serves as the capital of which nation?
If {k} is the capital, what is the country?
Please name the country that has {k} as capital city.
I forgot which country {k} is the capital of.

# verify
Is it a fact that the capital city of {c} is {k}?
I always thought {k} was the capital of {c}. Am I correct?
Tell me yes or no: {k} is the capital of {c}.
Would you say that {k} is the capital of {c}?
Someone told me {k} is the capital of {c}. Is this true?
Please confirm: is {k} really the capital of {c}?
Can we say that the capital of {c} is {k}?

# continent
{c} lies on which continent?
What is the name of the continent where {c} is?
To which continent does {c} belong?
I wonder what continent {c} is on.
Please say on which continent we find {c}.
For the country {c}, what is the continent?

# another_name
Can you also give me its other name?
What other names does the city have?
Is it known under another name?
Do you know another name for it?
Any other name for that city?
And does it also have a nickname?
What other name is used for it?
So what is it also called?

# and_of
Good. And of {c}?
And now the same for {c}?
And which one has {c}?
And what is it for {c}?
Then what about {c}?
OK, and of {c}?
And how about {c}?

# list
Can you think of {n} countries and tell me the capital of each?
Name {n} countries along with their capitals.
For my homework I need {n} countries and their capitals.
Just give {n} countries and, for each, the capital city.
Would you list {n} countries together with their capitals?
I'd like to see {n} countries and their capitals.
Please write {n} countries and the capital of each.
Help me: I need to know {n} countries and their capitals.
Pick any {n} countries and tell me their capitals.

# color
What is the usual color of {t}?
Does {t} have a color, and which one?
In which color should I draw {t}?
Would you tell me what color {t} usually is?
If I paint {t}, which color should I take?
My child asks: what color is {t}?
Please say what the color of {t} is.

# mix
A painter mixes {a} and {b}. What color is that?
Which color comes from mixing {a} and {b}?

# add
Do you know how much {a} plus {b} makes?
What number is {a} + {b}?
Could you work out {a} plus {b} for me?
Please compute the sum {a} + {b}.
Quick, {a} plus {b}!
If I add {a} and {b}, what is the result?

# sub
Do you know how much {a} minus {b} makes?
What number is {a} - {b}?
Could you work out {a} minus {b} for me?
Please compute {a} - {b} now.
If I subtract {b} from {a}, what is the result?

# mul
Do you know how much {a} times {b} makes?
What number is {a} * {b}?
Could you work out {a} times {b} for me?
Please compute the product {a} * {b}.
If I multiply {a} by {b}, what is the result?

# next
What {u} will come after {d}?
Please say which {u} comes next after {d}.
If it is {d} now, what is the {u} after it?
I forgot: which {u} is after {d}?

# previous
What {u} came before {d}?
Please say which {u} comes just before {d}.
I forgot: which {u} is before {d}?

# length
What number of days does {m} have?
Please say how many days there are in {m}.
I forgot: how many days does {m} have?

# month_number
In the calendar, which month comes {o}?
Please say which month is the {o} one.
I forgot: what is the {o} month of the year?

# greet
Hello there, my friend!
Hello, good day!
Hi hi!

# identity
May I ask who you are?
Please tell me your name.
So, who are you exactly?

# thanks
Thank you, that was great!

# json_country
Show me {c} with its capital as a JSON object.
I need a JSON object holding the country {c} and its capital.
Please produce JSON containing the country {c} and its capital.
For {c}, give the country and the capital as a JSON object.

# json_color
I need a JSON object holding the color of {t}.
Please produce JSON containing the color of {t}.

# json_sum
I need a JSON object holding {a}, {b} and the sum.
Please produce JSON for the sum of {a} and {b}.
"""

# Written after the training text was final and before any checkpoint of it was asked: a second opinion on HELD_OUT, whose errors
# were read while the training text was still changing.
_FINAL = """
# capital
Where does {c} have its capital?
Which city did {c} choose as its capital?
I need to fill in the capital of {c} on a form. What is it?
The capital city of {c}, what is it called?
Say the name of {c}'s capital city.
{c} is a country. What is its capital?
Of all the cities in {c}, which is the capital?
What is the seat of government of {c}?

# country
{k} is a capital. Which country does it belong to?
Name the nation governed from {k}.
What country would I be in if I stood in its capital, {k}?
Which country made {k} its capital?
{k}, capital of what country?

# verify
Is {k} really the capital city of {c}?
A friend claims that {k} is the capital of {c}. Is he right?
{c}'s capital is {k}, isn't it?
Do I remember well that {k} is the capital of {c}?

# continent
What continent would I travel to if I went to {c}?
Is {c} in Europe, Asia, Africa or somewhere else?
Name the continent on which {c} lies.

# another_name
What else do people call that city?
Has it got a nickname?
Which nickname does the city go by?
Can you tell me how else the city is known?

# and_of
What would it be for {c}?
Same question for {c}.
And if I ask about {c}?
Now what about {c}?

# list
Give me the names of {n} countries, with the capital next to each.
Show {n} countries with capitals.
Which {n} countries can you name, and what are their capitals?
Write down the capitals of {n} countries, with the countries.
Make me a small table of {n} countries and capitals.

# color
{t}: what color?
What color would you say {t} is?
A child wants to draw {t}. What color should it be?
Say the color of {t}.

# mix
What happens when I mix {a} and {b}: which color?
What color comes out of {a} and {b}?

# add
What do {a} and {b} add up to?
{a} added to {b} is what number?
Work out {a} + {b}, please.
What is the total of {a} and {b}?

# sub
{b} taken from {a} leaves what?
What remains of {a} after I take away {b}?
Work out {a} - {b}, please.

# mul
What do I get for {a} times {b}?
{a} multiplied with {b} is what number?
Work out {a} * {b}, please.

# next
The {u} right behind {d} is which one?
Once {d} is over, which {u} begins?

# previous
Which {u} do we have just before {d}?
The {u} ahead of {d} is which one?

# length
For how many days does {m} last?
How many days will {m} have?

# month_number
Which month comes as the {o} one?
What do we call the {o} month of a year?

# greet
Hi, how do you do!
Hello, nice day today!

# identity
Can I ask your name?
With whom do I have the pleasure?

# thanks
Many thanks for that!
That is kind of you, thank you!

# json_country
Answer with a JSON object: the country {c} and its capital.
What are {c} and its capital as JSON?
Turn the country {c} and its capital into JSON.

# json_color
Answer with a JSON object: the color of {t}.
What is the color of {t} as JSON?

# json_sum
Answer with a JSON object: {a}, {b} and their sum.
Turn {a} + {b} into JSON.
"""

OPENERS = (
    "Please tell me: ",
    "Hey, ",
    "Hello! ",
    "Hi, ",
    "Quick question: ",
    "Question: ",
    "I have a question. ",
    "Please answer: ",
    "Excuse me, ",
    "So, ",
    "OK. ",
    "Well, ",
    "Now tell me, ",
    "I am curious. ",
    "Help me. ",
)
CLOSERS = (" Thanks!", " Please answer briefly.", " Please.", " Thank you.", " Do you know?", " Tell me.", " Be brief.")

# Strewn into training questions, so that a word never met in a question does not change what is asked.
_FILLERS = """
really actually maybe perhaps just now then today again also always often usually sometimes never soon later quickly
simply kindly surely certainly probably exactly right good great nice small big old new long short my your our his her
their this that these those some any every each someone anyone everyone people friend teacher child student boss mother
father brother sister homework school test quiz game book map paper story would should could will might must may can did
was were been have had get make take give say said see look looking find found think thought know want wonder wondering
like try help need remind forgot remember ask asks show write read learn check confirm with for from about into over
because since while when if or and but so than well yes no ok oh please kind sir madam dear world time way thing name
"""
FILLERS = _FILLERS.split()
DROPPABLE = frozenset({"the", "is", "of", "a", "me", "are", "do", "you", "to", "in", "that", "it"})

_FRAMES = {
    "=": "[What is|Tell me|Give me|I need|I want|Find|Name|Write|I am looking for|I need to know|Do you know|Any idea of"
    "|I ask for|My question is about|Please state|Show me|I would like|Could you give me|Would you write|Let us have]",
    ">": "[Tell me|Do you know|Can you say|Could you say|Will you tell me|Would you tell me|I need to know|Please explain"
    "|I want to find out|I am not sure|Let us see|My friend asks|The question is|Guess|You surely know|Who knows|Teach me]",
}

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def _parse(text: str) -> dict[str, list[str]]:
    blocks = [block.strip().splitlines() for block in text.split("# ")[1:]]
    return {head: [_framed(line) for line in lines] for head, *lines in blocks}


def _framed(line: str) -> str:
    return f"{_FRAMES[line[0]]} {line[2:]}[.|?]" if line[0] in _FRAMES else line


TRAIN = _parse(_TRAIN)
HELD_OUT = _parse(_HELD_OUT)
FINAL = _parse(_FINAL)


class Phraser:
    """Draws a phrasing of a kind of question. Only training phrasings get filler words, openers, closers and the like."""

    def __init__(self, rng: random.Random, phrasings: dict[str, list[str]] = TRAIN) -> None:
        self.rng = rng
        self.phrasings = phrasings
        self.held_out = phrasings is not TRAIN

    def __call__(self, kind: str, /, **slots: object) -> str:
        text = self.rng.choice(self.phrasings[kind])
        while match := _CHOICE.search(text):
            text = text[: match.start()] + self.rng.choice(match[1].split("|")) + text[match.end() :]
        if not self.held_out and self.rng.random() < 0.3:
            text = self._other_words(text)
        text = text.format(**slots)
        text = text[0].upper() + text[1:] if text.startswith(("the ", "a ", "an ")) else text
        return text if self.held_out else self._other_edges(text)

    def _other_words(self, text: str) -> str:
        """One word less, and one to three fillers more; slots are still open and stay whole."""
        words = text.split(" ")
        droppable = [i for i, word in enumerate(words) if word in DROPPABLE]
        if droppable and self.rng.random() < 0.3:
            del words[self.rng.choice(droppable)]
        for _ in range(self.rng.randint(1, 3)):
            words.insert(self.rng.randint(0, len(words)), self.rng.choice(FILLERS))
        text = " ".join(words)
        return text[0].upper() + text[1:]

    def _other_edges(self, text: str) -> str:
        roll = self.rng.random()
        if roll < 0.15:
            text = self.rng.choice(OPENERS) + text
        elif roll < 0.25 and text[-1] in ".?!":
            text += self.rng.choice(CLOSERS)
        if self.rng.random() < 0.08:
            text = text.lower()
        return text.rstrip(".?!") if self.rng.random() < 0.1 else text


def expansions(line: str) -> list[str]:
    """Every text that a phrasing can give, slots left open."""
    match = _CHOICE.search(line)
    if not match:
        return [line]
    return [
        text
        for choice in match[1].split("|")
        for text in expansions(line[: match.start()] + choice + line[match.end() :])
    ]


def overlap() -> set[str]:
    """Held-out phrasings that training can also produce, openers, closers, case and final punctuation aside."""
    seen = {_bare(text) for lines in TRAIN.values() for line in lines for text in expansions(line)}
    asked = [line for phrasings in (HELD_OUT, FINAL) for lines in phrasings.values() for line in lines]
    held_out = {text for line in asked for text in expansions(line)}
    return {text for text in held_out if not seen.isdisjoint(_without_edges(text))}


def _without_edges(text: str) -> set[str]:
    starts = {text} | {text.removeprefix(opener) for opener in OPENERS}
    return {_bare(start.removesuffix(closer)) for start in starts for closer in ("", *CLOSERS)}


def _bare(text: str) -> str:
    return text.strip().lower().rstrip(".?!")
