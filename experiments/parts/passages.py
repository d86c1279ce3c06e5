"""Passages of well-known works in the public domain, typed for this library: a prompt and what a human wrote next."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm import text


class Passage(NamedTuple):
    """The beginning of a work, or of a part of it."""

    author: str
    title: str
    text: str


# Works of these are in the corpus that tiny-gpt2 was trained on; some passages may have been held out from it.
IN_CORPUS = ("King James Bible", "John Milton", "William Shakespeare")

PASSAGES = (
    Passage(
        "William Shakespeare",
        "Sonnet 18",
        "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\nRough winds do shake the "
        "darling buds of May,\nAnd summer's lease hath all too short a date:\nSometime too hot the eye of heaven "
        "shines,\nAnd often is his gold complexion dimm'd;\nAnd every fair from fair sometime declines,\nBy chance, or "
        "nature's changing course untrimm'd;",
    ),
    Passage(
        "William Shakespeare",
        "Hamlet, III.1",
        "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\nThe slings and arrows "
        "of outrageous fortune,\nOr to take arms against a sea of troubles\nAnd by opposing end them. To die, to "
        "sleep;\nNo more; and by a sleep to say we end\nThe heart-ache and the thousand natural shocks\nThat flesh is "
        "heir to:",
    ),
    Passage(
        "William Shakespeare",
        "Julius Caesar, III.2",
        "Friends, Romans, countrymen, lend me your ears;\nI come to bury Caesar, not to praise him.\nThe evil that men "
        "do lives after them;\nThe good is oft interred with their bones;\nSo let it be with Caesar. The noble "
        "Brutus\nHath told you Caesar was ambitious:\nIf it were so, it was a grievous fault,\nAnd grievously hath "
        "Caesar answer'd it.",
    ),
    Passage(
        "King James Bible",
        "Genesis 1",
        "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness "
        "was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let "
        "there be light: and there was light. And God saw the light, that it was good: and God divided the light from "
        "the darkness.",
    ),
    Passage(
        "King James Bible",
        "Psalm 23",
        "The LORD is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth me beside "
        "the still waters. He restoreth my soul: he leadeth me in the paths of righteousness for his name's sake. Yea, "
        "though I walk through the valley of the shadow of death, I will fear no evil: for thou art with me;",
    ),
    Passage(
        "King James Bible",
        "Ecclesiastes 3",
        "To every thing there is a season, and a time to every purpose under the heaven: A time to be born, and a time "
        "to die; a time to plant, and a time to pluck up that which is planted; A time to kill, and a time to heal; a "
        "time to break down, and a time to build up; A time to weep, and a time to laugh;",
    ),
    Passage(
        "John Milton",
        "Paradise Lost, I",
        "Of man's first disobedience, and the fruit\nOf that forbidden tree whose mortal taste\nBrought death into the "
        "World, and all our woe,\nWith loss of Eden, till one greater Man\nRestore us, and regain the blissful "
        "seat,\nSing, Heavenly Muse, that, on the secret top\nOf Oreb, or of Sinai, didst inspire\nThat shepherd who "
        "first taught the chosen seed",
    ),
    Passage(
        "Abraham Lincoln",
        "The Gettysburg Address",
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
        "Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil "
        "war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on "
        "a great battle-field of that war.",
    ),
    Passage(
        "Abraham Lincoln",
        "Second Inaugural Address",
        "With malice toward none, with charity for all, with firmness in the right as God gives us to see the right, "
        "let us strive on to finish the work we are in, to bind up the nation's wounds, to care for him who shall have "
        "borne the battle and for his widow and his orphan, to do all which may achieve and cherish a just and lasting "
        "peace",
    ),
    Passage(
        "Thomas Jefferson and others",
        "The Declaration of Independence",
        "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
        "have connected them with another, and to assume among the powers of the earth, the separate and equal station "
        "to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind "
        "requires that they should declare the causes",
    ),
    Passage(
        "Charles Dickens",
        "A Tale of Two Cities",
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
        "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
        "Darkness, it was the spring of hope, it was the winter of despair,",
    ),
    Passage(
        "Charles Dickens",
        "Great Expectations",
        "My father's family name being Pirrip, and my Christian name Philip, my infant tongue could make of both names "
        "nothing longer or more explicit than Pip. So, I called myself Pip, and came to be called Pip. I give Pirrip "
        "as my father's family name, on the authority of his tombstone and my sister, Mrs. Joe Gargery, who married "
        "the blacksmith.",
    ),
    Passage(
        "Charles Dickens",
        "A Christmas Carol",
        "Marley was dead: to begin with. There is no doubt whatever about that. The register of his burial was signed "
        "by the clergyman, the clerk, the undertaker, and the chief mourner. Scrooge signed it: and Scrooge's name was "
        "good upon 'Change, for anything he chose to put his hand to. Old Marley was as dead as a door-nail.",
    ),
    Passage(
        "Charles Dickens",
        "David Copperfield",
        "Whether I shall turn out to be the hero of my own life, or whether that station will be held by anybody else, "
        "these pages must show. To begin my life with the beginning of my life, I record that I was born (as I have "
        "been informed and believe) on a Friday, at twelve o'clock at night.",
    ),
    Passage(
        "Jane Austen",
        "Pride and Prejudice",
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
        "a wife. However little known the feelings or views of such a man may be on his first entering a "
        "neighbourhood, "
        "this truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful "
        "property of some one or other of their daughters.",
    ),
    Passage(
        "Jane Austen",
        "Emma",
        "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, seemed to unite "
        "some of the best blessings of existence; and had lived nearly twenty-one years in the world with very little "
        "to distress or vex her. She was the youngest of the two daughters of a most affectionate, indulgent father;",
    ),
    Passage(
        "Lewis Carroll",
        "Alice's Adventures in Wonderland",
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once "
        "or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "
        "and what is the use of a book, thought Alice, without pictures or conversations?",
    ),
    Passage(
        "Lewis Carroll",
        "Through the Looking-Glass",
        "One thing was certain, that the white kitten had had nothing to do with it: it was the black kitten's fault "
        "entirely. For the white kitten had been having its face washed by the old cat for the last quarter of an hour "
        "(and bearing it pretty well, considering); so you see that it couldn't have had any hand in the mischief.",
    ),
    Passage(
        "Herman Melville",
        "Moby-Dick",
        "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my purse, and "
        "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of "
        "the world. It is a way I have of driving off the spleen and regulating the circulation.",
    ),
    Passage(
        "Mark Twain",
        "Adventures of Huckleberry Finn",
        "You don't know about me without you have read a book by the name of The Adventures of Tom Sawyer; but that "
        "ain't no matter. That book was made by Mr. Mark Twain, and he told the truth, mainly. There was things which "
        "he stretched, but mainly he told the truth. That is nothing. I never seen anybody but lied one time or "
        "another,",
    ),
    Passage(
        "Mark Twain",
        "The Adventures of Tom Sawyer",
        "Saturday morning was come, and all the summer world was bright and fresh, and brimming with life. There was a "
        "song in every heart; and if the heart was young the music issued at the lips. There was cheer in every face "
        "and a spring in every step. The locust-trees were in bloom and the fragrance of the blossoms filled the air.",
    ),
    Passage(
        "Arthur Conan Doyle",
        "A Scandal in Bohemia",
        "To Sherlock Holmes she is always the woman. I have seldom heard him mention her under any other name. In his "
        "eyes she eclipses and predominates the whole of her sex. It was not that he felt any emotion akin to love for "
        "Irene Adler. All emotions, and that one particularly, were abhorrent to his cold, precise but admirably "
        "balanced mind.",
    ),
    Passage(
        "Arthur Conan Doyle",
        "A Study in Scarlet",
        "In the year 1878 I took my degree of Doctor of Medicine of the University of London, and proceeded to Netley "
        "to go through the course prescribed for surgeons in the army. Having completed my studies there, I was duly "
        "attached to the Fifth Northumberland Fusiliers as Assistant Surgeon. The regiment was stationed in India at "
        "the time,",
    ),
    Passage(
        "H. G. Wells",
        "The War of the Worlds",
        "No one would have believed in the last years of the nineteenth century that this world was being watched "
        "keenly and closely by intelligences greater than man's and yet as mortal as his own; that as men busied "
        "themselves about their various concerns they were scrutinised and studied, perhaps almost as narrowly as a "
        "man with a microscope might scrutinise the transient creatures that swarm and multiply in a drop of water.",
    ),
    Passage(
        "H. G. Wells",
        "The Time Machine",
        "The Time Traveller (for so it will be convenient to speak of him) was expounding a recondite matter to us. "
        "His "
        "grey eyes shone and twinkled, and his usually pale face was flushed and animated. The fire burned brightly, "
        "and the soft radiance of the incandescent lights in the lilies of silver caught the bubbles that flashed and "
        "passed in our glasses.",
    ),
    Passage(
        "Bram Stoker",
        "Dracula",
        "Left Munich at 8:35 P.M., on 1st May, arriving at Vienna early next morning; should have arrived at 6:46, but "
        "train was an hour late. Buda-Pesth seems a wonderful place, from the glimpse which I got of it from the train "
        "and the little I could walk through the streets. I feared to go very far from the station,",
    ),
    Passage(
        "Mary Shelley",
        "Frankenstein",
        "You will rejoice to hear that no disaster has accompanied the commencement of an enterprise which you have "
        "regarded with such evil forebodings. I arrived here yesterday, and my first task is to assure my dear sister "
        "of my welfare and increasing confidence in the success of my undertaking. I am already far north of London,",
    ),
    Passage(
        "Charlotte Bronte",
        "Jane Eyre",
        "There was no possibility of taking a walk that day. We had been wandering, indeed, in the leafless shrubbery "
        "an hour in the morning; but since dinner the cold winter wind had brought with it clouds so sombre, and a "
        "rain so penetrating, that further out-door exercise was now out of the question. I was glad of it: I never "
        "liked long walks,",
    ),
    Passage(
        "Emily Bronte",
        "Wuthering Heights",
        "I have just returned from a visit to my landlord - the solitary neighbour that I shall be troubled with. This "
        "is certainly a beautiful country! In all England, I do not believe that I could have fixed on a situation so "
        "completely removed from the stir of society. A perfect misanthropist's heaven: and Mr. Heathcliff and I are "
        "such a suitable pair to divide the desolation between us.",
    ),
    Passage(
        "Edgar Allan Poe",
        "The Fall of the House of Usher",
        "During the whole of a dull, dark, and soundless day in the autumn of the year, when the clouds hung "
        "oppressively low in the heavens, I had been passing alone, on horseback, through a singularly dreary tract of "
        "country; and at length found myself, as the shades of the evening drew on, within view of the melancholy "
        "House of Usher.",
    ),
    Passage(
        "Henry David Thoreau",
        "Walden",
        "I went to the woods because I wished to live deliberately, to front only the essential facts of life, and see "
        "if I could not learn what it had to teach, and not, when I came to die, discover that I had not lived. I did "
        "not wish to live what was not life, living is so dear; nor did I wish to practise resignation,",
    ),
    Passage(
        "Nathaniel Hawthorne",
        "The Scarlet Letter",
        "A throng of bearded men, in sad-coloured garments and grey steeple-crowned hats, inter-mixed with women, some "
        "wearing hoods, and others bareheaded, was assembled in front of a wooden edifice, the door of which was "
        "heavily timbered with oak, and studded with iron spikes. The founders of a new colony, whatever Utopia of "
        "human virtue and happiness they might originally project,",
    ),
    Passage(
        "Louisa May Alcott",
        "Little Women",
        '"Christmas won\'t be Christmas without any presents," grumbled Jo, lying on the rug. "It\'s so dreadful to be '
        "poor!\" sighed Meg, looking down at her old dress. \"I don't think it's fair for some girls to have plenty of "
        'pretty things, and other girls nothing at all," added little Amy, with an injured sniff.',
    ),
    Passage(
        "Robert Louis Stevenson",
        "Treasure Island",
        "I remember him as if it were yesterday, as he came plodding to the inn door, his sea-chest following behind "
        "him in a hand-barrow - a tall, strong, heavy, nut-brown man, his tarry pigtail falling over the shoulder of "
        "his soiled blue coat, his hands ragged and scarred, with black, broken nails, and the sabre cut across one "
        "cheek, a dirty, livid white.",
    ),
    Passage(
        "Oscar Wilde",
        "The Picture of Dorian Gray",
        "The studio was filled with the rich odour of roses, and when the light summer wind stirred amidst the trees "
        "of "
        "the garden, there came through the open door the heavy scent of the lilac, or the more delicate perfume of "
        "the pink-flowering thorn. From the corner of the divan of Persian saddle-bags on which he was lying,",
    ),
    Passage(
        "L. Frank Baum",
        "The Wonderful Wizard of Oz",
        "Dorothy lived in the midst of the great Kansas prairies, with Uncle Henry, who was a farmer, and Aunt Em, who "
        "was the farmer's wife. Their house was small, for the lumber to build it had to be carried by wagon many "
        "miles. There were four walls, a floor and a roof, which made one room;",
    ),
    Passage(
        "Kenneth Grahame",
        "The Wind in the Willows",
        "The Mole had been working very hard all the morning, spring-cleaning his little home. First with brooms, then "
        "with dusters; then on ladders and steps and chairs, with a brush and a pail of whitewash; till he had dust in "
        "his throat and eyes, and splashes of whitewash all over his black fur, and an aching back and weary arms.",
    ),
    Passage(
        "Jerome K. Jerome",
        "Three Men in a Boat",
        "There were four of us - George, and William Samuel Harris, and myself, and Montmorency. We were sitting in my "
        "room, smoking, and talking about how bad we were - bad from a medical point of view I mean, of course. We "
        "were all feeling seedy, and we were getting quite nervous about it.",
    ),
    Passage(
        "Charles Darwin",
        "On the Origin of Species",
        "When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the "
        "inhabitants of South America, and in the geological relations of the present to the past inhabitants of that "
        "continent. These facts seemed to me to throw some light on the origin of species - that mystery of mysteries,",
    ),
    Passage(
        "Adam Smith",
        "The Wealth of Nations",
        "The greatest improvement in the productive powers of labour, and the greater part of the skill, dexterity, "
        "and "
        "judgment, with which it is anywhere directed, or applied, seem to have been the effects of the division of "
        "labour. The effects of the division of labour, in the general business of society, will be more easily "
        "understood by considering in what manner it operates in some particular manufactures.",
    ),
)


def chosen(count: int) -> tuple[Passage, ...]:
    """Return so many passages, from all over the list."""
    places = np.linspace(0, len(PASSAGES) - 1, count).round().astype(int)
    return tuple(PASSAGES[place] for place in places)


def first_tokens(tokenizer: Any, passages: tuple[Passage, ...], count: int) -> np.ndarray:
    """Return the first tokens of each passage, [passage, time].

    Raises:
        ValueError: if a passage has fewer.
    """
    tokens = [text.encode(tokenizer, passage.text) for passage in passages]
    short = [passage.title for passage, row in zip(passages, tokens, strict=True) if len(row) < count]
    if short:
        raise ValueError(f"these passages have fewer than {count} tokens: {', '.join(short)}.")
    return np.asarray([row[:count] for row in tokens], np.int32)
