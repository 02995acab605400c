"""Texts for `real_weights.py`, as batches of tokens.

A novel, stories, chemical reactions, sentences with mistakes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from examples.assets import GUTENBERG, fetch

# the front matter, table of contents and extracts come first
SKIPPED_CHARACTERS = 20_000
IGNORED = -100
# texts that are joined from shorter ones
ROWS = 16

# reactions that every textbook has, as reactants and reagents >> product
REACTIONS = """
CC(=O)O.NCc1ccccc1.CCN=C=NCCCN(C)C>>CC(=O)NCc1ccccc1
O=C(O)c1ccccc1.NC1CCCCC1.CCN=C=NCCCN(C)C>>O=C(NC1CCCCC1)c1ccccc1
OB(O)c1ccccc1.Brc1ccncc1.[Na+].[Na+].O=C([O-])[O-]>>c1ccc(-c2ccncc2)cc1
CC1(C)OB(c2ccc(F)cc2)OC1(C)C.Brc1cccc(C#N)c1.O=C([O-])[O-].[K+].[K+].C1COCCO1>>N#Cc1cccc(-c2ccc(F)cc2)c1
CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F
C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12
CC(C)(C)OC(=O)N1CCC(N)CC1.O=Cc1ccccc1.CC(=O)O[BH-](OC(C)=O)OC(C)=O.[Na+].ClCCl>>CC(C)(C)OC(=O)N1CCC(NCc2ccccc2)CC1
CC(C)(C)OC(=O)N1CCN(c2ccc(F)cc2)CC1.O=C(O)C(F)(F)F.ClCCl>>Fc1ccc(N2CCNCC2)cc1
CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCCc1ccc(O)cc1.CCN(CC)CC.ClCCl>>CC(C)(C)OC(=O)NCCc1ccc(O)cc1
COC(=O)c1ccc(OC)cc1.[Li+].[OH-].C1CCOC1.O>>COc1ccc(C(=O)O)cc1
CCOC(=O)CCc1ccccc1.[Na+].[OH-].CCO>>O=C(O)CCc1ccccc1
O=C(O)c1ccc(Br)cc1.CO.O=S(=O)(O)O>>COC(=O)c1ccc(Br)cc1
O=C(Cl)c1ccccc1.Nc1ccc(Cl)cc1.c1ccncc1>>O=C(Nc1ccc(Cl)cc1)c1ccccc1
CS(=O)(=O)Cl.OCCc1ccccc1.CCN(CC)CC.ClCCl>>CS(=O)(=O)OCCc1ccccc1
Cc1ccc(S(=O)(=O)Cl)cc1.NCc1ccco1.c1ccncc1>>Cc1ccc(S(=O)(=O)NCc2ccco2)cc1
O=[N+]([O-])c1ccc(F)cc1.C1CCNCC1.O=C([O-])[O-].[K+].[K+].CS(C)=O>>O=[N+]([O-])c1ccc(N2CCCCC2)cc1
O=[N+]([O-])c1ccc(N2CCOCC2)cc1.[H][H].[Pd].CCO>>Nc1ccc(N2CCOCC2)cc1
COc1ccc([N+](=O)[O-])cc1.[Fe].[NH4+].[Cl-].CCO.O>>COc1ccc(N)cc1
O=Cc1ccc(Cl)cc1.[BH4-].[Na+].CO>>OCc1ccc(Cl)cc1
COC(=O)c1cccc(Br)c1.[AlH4-].[Li+].C1CCOC1>>OCc1cccc(Br)c1
OCc1ccc(F)cc1.ClCCl.O=[Mn]=O>>O=Cc1ccc(F)cc1
Oc1ccccc1.BrCc1ccccc1.O=C([O-])[O-].[K+].[K+].CC(C)=O>>c1ccc(COc2ccccc2)cc1
Oc1ccc(Br)cc1.CI.O=C([O-])[O-].[Cs+].[Cs+].CN(C)C=O>>COc1ccc(Br)cc1
COc1ccc(Br)cc1.BrB(Br)Br.ClCCl>>Oc1ccc(Br)cc1
c1ccc(COc2ccc(C3CC3)cc2)cc1.[H][H].[Pd].CO>>Oc1ccc(C2CC2)cc1
Brc1ccccc1.C1COCCN1.CC(C)(C)[O-].[Na+].Cc1ccccc1>>c1ccc(N2CCOCC2)cc1
C#Cc1ccccc1.Ic1ccc(C(=O)OC)cc1.CCN(CC)CC.I[Cu]>>COC(=O)c1ccc(C#Cc2ccccc2)cc1
C[Mg]Br.O=C(c1ccccc1)c1ccccc1.C1CCOC1>>CC(O)(c1ccccc1)c1ccccc1
O=C1CCCCC1.NO.Cl.CCO>>ON=C1CCCCC1
CC(=O)c1ccccc1.O=Cc1ccc(OC)cc1.[Na+].[OH-].CCO>>COc1ccc(C=CC(=O)c2ccccc2)cc1
Cc1ccccc1.O=C1CCC(=O)N1Br.ClC(Cl)(Cl)Cl>>BrCc1ccccc1
Nc1ccccc1.O=C=Nc1ccccc1.ClCCl>>O=C(Nc1ccccc1)Nc1ccccc1
Clc1ncnc2[nH]ccc12.NCc1ccccc1.CCN(C(C)C)C(C)C.CC(C)O>>c1ccc(CNc2ncnc3[nH]ccc23)cc1
CC(C)(C)OC(=O)N[C@@H](Cc1ccccc1)C(=O)O.COC(=O)CN.CCN=C=NCCCN(C)C>>COC(=O)CNC(=O)[C@H](Cc1ccccc1)NC(=O)OC(C)(C)C
C=CCN=C=S.CNCc1ccc(C#N)cc1.NNC(=O)c1cn2c(n1)CCCC2>>C=CCN1C(C2=CN3CCCCC3=N2)=NN=C1N(C)CC1=CC=C(C#N)C=C1
CC(C)(C)[Si](C)(C)Cl.OCC1CCCO1.c1c[nH]cn1.CN(C)C=O>>CC(C)(C)[Si](C)(C)OCC1CCCO1
""".strip().split("\n")
# mistakes that native writers make
SENTENCES = """
Yesterday I buyed a new car and drived it home.
Their going to bring there books over they're tomorrow.
She don't like the way he talk to her brother.
The informations that you sended me was very useful.
He is more taller then his older sister.
We was waiting for the bus when it begun to rain.
I have went to the store to many times this week.
Its a shame that the dog lost it's collar again.
The team have losed three games and than won two.
Him and me is going to visit our grandmother on sunday.
If I would of known, I would have came earlier.
There is many reasons why peoples move to the city.
The childrens was playing in the garden all day long.
She has wrote three books, but nobody have read them.
i think that paris is the most beautiful city.
You should of told me that your leaving so soon.
He catched the ball and throwed it back to us.
Everyone have there own opinion about this matter.
The letter was wrote by a man which lived next door.
We didn't saw nothing strange in the old house.
My friend he live in a small village near the sea.
The affect of the storm were felt for many days.
Who's book is this that was leaved on the table?
I can't hardly believe that she runned so far.
The news are good and the weathers is fine today.
A apple a day keep the doctor away, or so they says.
After he had ate the soup, he feeled much more better.
Less people come to the fair then in the passed.
The man that I spoke with him was not very friendly.
Where is you going with them heavy bags?
They has been living here since ten years.
She accepted the advise and payed the bill quickly.
The ship sinked before the captain could saved it.
I am agree with you that the price are too high.
He said me that he were tired and want to sleep.
This is the most easiest question of the hole test.
Neither of the boys have finished there work yet.
The sun rised over the hills and the birds singed.
""".strip().split("\n")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens; `real` is false at padding, `targets` what tokens predict."""

    text: str
    ids: Tensor
    real: Tensor
    targets: Tensor | None = None


def book(name: str, skipped: int = 0) -> str:
    return (fetch(GUTENBERG) / name).read_text(encoding="utf-8", errors="replace")[skipped:]


def moby_dick() -> str:
    return book("moby_dick.txt", SKIPPED_CHARACTERS)


def running(text: str, title: str, rows: int, length: int, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """The text from its beginning, for a decoder: each token predicts the next."""
    # what the tokenizer itself sets before a text
    start = tokenizer("").input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids
    step = length - len(start)
    table = torch.tensor([start + ids[at : at + step] for at in range(0, rows * step, step)])
    targets = torch.cat([table[:, 1:], torch.full((rows, 1), IGNORED)], 1)
    return Batch(title, table, torch.ones_like(table, dtype=torch.bool), targets)


def novel(tokenizer: PreTrainedTokenizerBase) -> Batch:
    return running(moby_dick()[:16_000], "Moby Dick", 1, 2048, tokenizer)


def stories(tokenizer: PreTrainedTokenizerBase) -> Batch:
    return running(book("bryant_stories.txt", 3_000)[:20_000], "Bryant, Stories to Tell", 8, 256, tokenizer)


def padded(texts: list[str], title: str, tokenizer: PreTrainedTokenizerBase) -> Batch:
    found = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    return Batch(title, found.input_ids, found.attention_mask.bool())


def paragraphs(tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Short and long ones together, so that most rows are padded."""
    found = [" ".join(text.split()) for text in moby_dick()[:20_000].split("\n\n")]
    return padded([text for text in found if text][:12], "paragraphs of Moby Dick", tokenizer)


def chapters(tokenizer: PreTrainedTokenizerBase) -> Batch:
    # 4,000 characters are more than 512 tokens
    text = moby_dick()
    return padded([text[at : at + 4_000] for at in range(0, 32_000, 4_000)], "Moby Dick", tokenizer)


def sentences(tokenizer: PreTrainedTokenizerBase) -> Batch:
    return padded(SENTENCES, "sentences with mistakes", tokenizer)


def texts(tokenizer: PreTrainedTokenizerBase) -> Batch:
    # nine sentences have some 110 tokens, and the tagger was trained on 128 at most
    return padded(_shuffled_joins(SENTENCES, " ".join, 9), "nine sentences joined", tokenizer)


def long_texts(tokenizer: PreTrainedTokenizerBase) -> Batch:
    # each twice, to have more than 512 tokens
    return padded(_shuffled_joins(2 * SENTENCES, " ".join, 60), "sixty sentences joined", tokenizer)


def reactions(tokenizer: PreTrainedTokenizerBase) -> Batch:
    return padded(REACTIONS, "reactions", tokenizer)


def one_pot(tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Many reactions written as one, which fills all positions; nobody would run it."""

    def join(chosen: list[str]) -> str:
        sides = [reaction.split(">>") for reaction in chosen]
        return ">>".join(".".join(side) for side in zip(*sides, strict=True))

    # nine reactions have some 500 tokens
    return padded(_shuffled_joins(REACTIONS, join, 10), "ten reactions as one", tokenizer)


def _shuffled_joins(items: list[str], join: Callable[[list[str]], str], count: int) -> list[str]:
    draw = random.Random(0)
    return [join(draw.sample(items, count)) for _ in range(ROWS)]


def hidden_tokens(batch: Callable[[PreTrainedTokenizerBase], Batch]) -> Callable[[PreTrainedTokenizerBase], Batch]:
    """The same with every seventh token masked, for the model to find."""

    def masked(tokenizer: PreTrainedTokenizerBase) -> Batch:
        plain = batch(tokenizer)
        ends = torch.isin(plain.ids, torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]))
        seventh = (torch.arange(plain.ids.shape[1]) % 7 == 3) & plain.real & ~ends
        ids = plain.ids.masked_fill(seventh, tokenizer.mask_token_id)
        return Batch(plain.text, ids, plain.real, plain.ids.masked_fill(~seventh, IGNORED))

    return masked
