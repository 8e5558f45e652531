//! Bytes from outside, made fit to be shown.

/// A path or name for a message or a prompt: control characters and bytes that are not UTF-8 are
/// escaped, so that it cannot forge a line or draw on a terminal; at most 200 characters.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    const LONGEST: usize = 200;
    let mut shown = String::new();
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character.is_control() || turns_direction(character) {
                shown.extend(character.escape_default());
            } else {
                shown.push(character);
            }
        }
        for byte in chunk.invalid() {
            shown.push_str(&format!("\\x{byte:02x}"));
        }
    }
    match shown.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &shown[..end]),
        None if shown.is_empty() => "(a file without a name)".to_owned(),
        None => shown,
    }
}

/// Characters that turn the writing direction and so can make a name read as another one.
#[must_use]
pub fn turns_direction(character: char) -> bool {
    matches!(character, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn nothing_hostile_gets_through() {
        assert_eq!(printable(b"/home/a/x y.img "), "/home/a/x y.img ");
        assert_eq!(printable(b"a\nb\x1b[31m\xff\xc3\xa9"), "a\\nb\\u{1b}[31m\\xffé");
        assert_eq!(printable("a\u{202e}b".as_bytes()), "a\\u{202e}b");
        assert_eq!(printable(&[b'x'; 5000]).chars().count(), 201);
    }
}
