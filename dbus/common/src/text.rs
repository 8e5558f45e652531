//! Escapes untrusted bytes for prompts, messages, logs and tables.

/// The maximum number of characters shown of a path or a name.
const LONGEST: usize = 200;

/// A path or name for a message or a prompt, at most 200 characters. Characters for which
/// [`is_deceptive`] is true and bytes that are not UTF-8 are escaped, so that it cannot forge a line,
/// control a terminal or look like another name.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    // Each shown character represents at least one byte.
    let shown = escaped(&bytes[..bytes.len().min(LONGEST * 4 + 4)]);
    match shown.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &shown[..end]),
        None if shown.is_empty() => "(a file without a name)".to_owned(),
        None => shown,
    }
}

/// Like [`printable`], without a limit on the length.
#[must_use]
pub fn escaped(bytes: &[u8]) -> String {
    let mut shown = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if is_deceptive(character) {
                shown.extend(character.escape_default());
            } else {
                shown.push(character);
            }
        }
        for byte in chunk.invalid() {
            shown.push_str(&format!("\\x{byte:02x}"));
        }
    }
    shown
}

/// A name or value from a caller, for a message: at most 64 characters.
#[must_use]
pub fn shortened(word: &str) -> String {
    match word.char_indices().nth(64) {
        Some((end, _)) => format!("{}…", &word[..end]),
        None => word.to_owned(),
    }
}

/// Characters that can make a text look like another one, or that a terminal interprets: control characters
/// (Cc), line and paragraph separators (Zl, Zp), formatting such as changes of the writing direction (Cf),
/// invisible characters (Default_Ignorable_Code_Point, the blank U+2800), private use (Co), noncharacters, and
/// planes without assigned characters.
#[must_use]
pub fn is_deceptive(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{34f}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}'
            | '\u{890}' | '\u{891}' | '\u{8e2}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{e000}'..='\u{f8ff}'
            | '\u{fdd0}'..='\u{fdef}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{40000}'..='\u{10ffff}')
        || u32::from(character) & 0xfffe == 0xfffe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_is_escaped() {
        assert_eq!(printable(b"/home/a/x y.img "), "/home/a/x y.img ");
        assert_eq!(printable(b"a\nb\x1b[31m\xff\xc3\xa9"), "a\\nb\\u{1b}[31m\\xff\u{e9}");
        assert_eq!(printable("a\u{202e}b".as_bytes()), "a\\u{202e}b");
        assert_eq!(escaped("\u{9b}31m\u{202e}gpj.exe".as_bytes()), "\\u{9b}31m\\u{202e}gpj.exe");
        for character in [
            '\u{7f}',
            '\u{85}',
            '\u{ad}',
            '\u{61c}',
            '\u{180e}',
            '\u{200b}',
            '\u{200d}',
            '\u{200e}',
            '\u{2028}',
            '\u{2029}',
            '\u{2060}',
            '\u{2066}',
            '\u{2069}',
            '\u{206a}',
            '\u{3164}',
            '\u{fe0f}',
            '\u{feff}',
            '\u{fffe}',
            '\u{fff9}',
            '\u{e000}',
            '\u{1ffff}',
            '\u{e0001}',
            '\u{e0041}',
            '\u{e0100}',
            '\u{f0000}',
            '\u{10ffff}',
        ] {
            let shown = printable(format!("a{character}b").as_bytes());
            assert_eq!(shown, format!("a\\u{{{:x}}}b", u32::from(character)));
        }
    }

    #[test]
    fn ordinary_text_is_not_escaped() {
        for name in [
            "Größe.img",
            "ελληνικά",
            "кириллица",
            "עברית",
            "العربية",
            "हिन्दी",
            "日本語　写真",
            "한국어",
            "🙂.iso",
            "a\u{301}",
        ] {
            assert_eq!(printable(name.as_bytes()), name);
        }
    }

    #[test]
    fn a_name_is_shortened_and_a_text_is_not() {
        assert_eq!(printable(&[b'x'; 5000]).chars().count(), 201);
        assert_eq!(printable(&[0xff; 5000]).chars().count(), 201);
        assert_eq!(printable("\u{1f642}".repeat(300).as_bytes()).chars().count(), 201);
        assert_eq!(printable("\u{1f642}".repeat(200).as_bytes()).chars().count(), 200);
        assert_eq!(escaped(&[b'x'; 5000]).len(), 5000);
        assert_eq!(printable(b""), "(a file without a name)");
    }
}
