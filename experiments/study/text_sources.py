"""Where the study's text comes from, as the README beside it states it: for cards of models.

Sources under CC BY-SA and books that give a year after 1930 are left out of the study (`corpus`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextSource:
    """A source of text.

    Attributes:
      name: as documents carry it.
      origin: repository and commit it was taken from; several with "; ".
      licence: as its authors state it.
      stated: where they do.
    """

    name: str
    origin: str
    licence: str
    stated: str


SOURCES = (
    TextSource(
        "classic-books", "mlschmitt/classic-books-markdown@9448827",
        "public domain in the USA", 'README.md: "All titles from the public domain"',
    ),
    TextSource(
        "classic-books-rest", "mlschmitt/classic-books-markdown@9448827",
        "public domain in the USA", 'README.md: "All titles from the public domain"',
    ),
    TextSource(
        "common-library", "ge1789/common-library@d1a1a93", "public domain",
        "README.md, 'Public Domain'",
    ),
    TextSource(
        "gutenberg-text", "rcdm-uga/Gutenberg_Text@a0b16d3",
        "public domain in the USA (Project Gutenberg texts; its header and name removed)",
        "in each file's header; the repository has no licence file",
    ),
    TextSource(
        "100-english-novels", "computationalstylistics/100_english_novels@143e601",
        "public domain in the USA by age",
        "nowhere in the repository: inferred from authors and dates",
    ),
    TextSource(
        "eltec-eng", "COST-ELTeC/ELTeC-eng@3db3b67",
        "texts public domain; mark-up CC BY 4.0, removed", "README.md, 'Licence'",
    ),
    TextSource("ecco-tcp", "Early-Modern-OCR/TCP-ECCO-texts@fdb564b", "CC0 1.0", "LICENSE"),
    TextSource("digitalgov", "GSA/digitalgov.gov@4979583206", "CC0 1.0 / US public domain",
               "LICENSE.md"),
    TextSource(
        "openstax-ccby",
        "openstax/osbooks-introduction-anthropology@418eedd; "
        "openstax/osbooks-life-liberty-and-pursuit-happiness@acb6fbe; "
        "openstax/osbooks-principles-economics-bundle@cd31beb; "
        "openstax/osbooks-introduction-intellectual-property@be76c2d",
        "CC BY 4.0", "LICENSE and collections/*.xml of each",
    ),
    TextSource("frus-history", "HistoryAtState/frus-history@a6bd97c",
               "US public domain + CC0 1.0", "LICENSE.md"),
    TextSource("factbook", "factbook/factbook.json@8662a8b1",
               "CC0 1.0 (CIA World Factbook, US public domain)", "LICENSE.md"),
    TextSource("acl-abstracts", "marcschulder/acl-anthology@c2982ef9",
               "CC BY 4.0 (volumes of 2016 to 2020)", "hugo/content/faq/copyright.md"),
    TextSource(
        "dc-law", "DCCouncil/law-xml@9123af0180", "government edicts, public domain in the USA",
        "nowhere in the repository: statutes are edicts of government; annotations left out",
    ),
    TextSource("peps", "python/peps@ba4deeb79", "public domain or CC0 1.0",
               "'Copyright' section of each PEP"),
    TextSource("rust-rfcs", "rust-lang/rfcs@354518a8", "Apache-2.0 / MIT",
               "LICENSE-APACHE, LICENSE-MIT"),
    TextSource("rust-book", "rust-lang/book@917544888", "Apache-2.0 / MIT",
               "LICENSE-APACHE, LICENSE-MIT"),
    TextSource("eips", "ethereum/EIPs@f767a1e80", "CC0 1.0", "LICENSE.md"),
    TextSource("kubernetes-keps", "kubernetes/enhancements@64765b4b0", "Apache-2.0", "LICENSE"),
    TextSource("kubernetes-community", "kubernetes/community@24e7d8f54", "Apache-2.0", "LICENSE"),
    TextSource("ms-well-architected", "MicrosoftDocs/well-architected@1353bbb6", "CC BY 4.0",
               "LICENSE"),
    TextSource("ms-powershell", "MicrosoftDocs/PowerShell-Docs@27138b21b", "CC BY 4.0",
               "LICENSE.md"),
    TextSource("ms-cpp", "MicrosoftDocs/cpp-docs@a2e592a8fc", "CC BY 4.0", "LICENSE"),
    TextSource("ms-win32", "MicrosoftDocs/win32@47e64c189d", "CC BY 4.0", "LICENSE"),
)  # fmt: skip
