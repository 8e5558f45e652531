//! The intended differences of loopd's losetup from util-linux's.

use super::script::Answer;

/// A command line whose answers differ.
pub struct Difference {
    /// The script.
    pub script: &'static str,
    /// The line.
    pub line: &'static str,
    /// The part that differs.
    pub part: Part,
    /// The first version of util-linux that must differ; earlier ones may.
    pub since: (u32, u32),
}

/// A part of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Standard error; the rest is the same.
    Messages,
    /// Anything.
    Answer,
}

impl Part {
    /// Whether the two differ only in this part.
    pub fn differs(self, theirs: &Answer, ours: &Answer) -> bool {
        let is_same = (&theirs.stdout, theirs.status) == (&ours.stdout, ours.status);
        theirs != ours && (is_same || self == Self::Answer)
    }
}

/// A reason for differences, and the command lines that it applies to.
struct Because {
    /// The text in the manual page.
    _reason: &'static str,
    part: Part,
    since: (u32, u32),
    lines: &'static [(&'static str, &'static str)],
}

const OLD: (u32, u32) = (0, 0);
const REFERENCE: (u32, u32) = (2, 42);

const LIST: &[Because] = &[
    Because {
        _reason: "a truncation warning says what is lost",
        part: Part::Messages,
        since: OLD,
        lines: &[
            ("files that do not end with a sector", "$A odd.img"),
            ("files that do not end with a sector", "--sizelimit 1000 $A a.img"),
            ("offsets within a sector", "-o 100 $A a.img"),
            ("offsets within a sector", "-o 1.05K $A a.img"),
        ],
    },
    Because {
        _reason: "loopd attaches whole sectors only, and at least one",
        part: Part::Answer,
        since: OLD,
        lines: &[
            ("files that do not end with a sector", "$A tiny.img"),
            ("files that do not end with a sector", "-l $A"),
            ("files that do not end with a sector", "$A empty.img"),
            ("files that do not end with a sector", "-J -l $A"),
            ("files that do not end with a sector", "-o 512 $A odd.img"),
            ("files that do not end with a sector", "--raw -l $A"),
            ("files that do not end with a sector", "--detach $A"),
            ("offsets and sizes", "-o 1M $A a.img"),
            ("offsets and sizes", "-o 2M $A a.img"),
            ("offsets and sizes", "-o 1.75M $A a.img"),
            ("offsets and sizes", "-O NAME,OFFSET,RO $A"),
            ("offsets and sizes", "--detach $A"),
            ("extents that are not whole sectors", "--sizelimit 100 $A a.img"),
            ("extents that are not whole sectors", "-l $A"),
            ("extents that are not whole sectors", "-d $A"),
        ],
    },
    Because {
        _reason: "a device that was made for a file goes with it",
        part: Part::Answer,
        since: REFERENCE,
        lines: &[("a device that is not there yet", "--remove $C")],
    },
    Because {
        _reason: "a detach that leaves the device in use names its users",
        part: Part::Messages,
        since: OLD,
        lines: &[("reuse takes a lazy detach back", "-d $A"), ("detaching what is in use", "-d $A")],
    },
    Because {
        _reason: "options of cryptoloop say what to use today",
        part: Part::Messages,
        since: OLD,
        lines: &[
            ("historic spellings", "-e aes a.img"),
            ("historic spellings", "-E 1 a.img"),
            ("historic spellings", "-k 128 -f a.img"),
            ("historic spellings", "-N -f a.img"),
            ("historic spellings", "-p 0 -f a.img"),
            ("historic spellings", "--encryption aes a.img"),
            ("historic spellings", "--pass-fd 0 a.img"),
        ],
    },
    Because {
        _reason: "a device of another program's is given back only if nobody but root can change what it shows",
        part: Part::Answer,
        since: OLD,
        lines: &[("look at theirs", "-L -f --show a.img")],
    },
    Because {
        _reason: "-v is accepted",
        part: Part::Answer,
        since: REFERENCE,
        lines: &[
            ("historic spellings", "-v -j a.img"),
            ("historic spellings", "-vj a.img"),
            ("historic spellings", "--verbose -j a.img"),
        ],
    },
    Because {
        _reason: "a block size of more than 32 bits is refused, not cut",
        part: Part::Answer,
        since: OLD,
        lines: &[
            ("a block size that no number of 32 bits holds", "-b 4294968320 $A a.img"),
            ("a block size that no number of 32 bits holds", "-O LOG-SEC $A"),
            ("a block size that no number of 32 bits holds", "-d $A"),
        ],
    },
];

/// All intended differences.
pub fn all() -> impl Iterator<Item = Difference> {
    LIST.iter().flat_map(|because| {
        because.lines.iter().map(|(script, line)| Difference {
            script,
            line,
            part: because.part,
            since: because.since,
        })
    })
}
