//! The names of mount directories, made from text in an image.

use loopd_common::text::is_deceptive;

use crate::kernel::FileSystem;
use crate::snapshot::Snapshot;

/// Bytes that a name may have; a number may follow it.
const LONGEST: usize = 120;
/// Bytes that a name may have when the service manager escapes it for the name of a unit, which has at most 255 in
/// all. Most bytes that are neither letters nor digits become four.
pub const LONGEST_ESCAPED_NAME: usize = 160;
/// The name if nothing better is known.
const NAMELESS: &str = "image";

/// The name for a volume: its label, else its UUID, else the name of the image.
pub(super) fn of_volume(file_system: &FileSystem, attachment: &Snapshot) -> String {
    let path = &attachment.device.backing_file;
    let file = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let words = [file_system.label.as_bytes(), file_system.uuid.as_bytes(), file];
    words.into_iter().find_map(safe_name).unwrap_or_else(|| NAMELESS.to_owned())
}

/// The text as the name of one directory; `None` if nothing is left of it.
#[must_use]
pub fn safe_name(words: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(words);
    let harmless: String = text.trim().chars().map(harmless).collect();
    let name = match harmless.strip_prefix('.') {
        Some(rest) => format!("_{rest}"),
        None => harmless,
    };
    let name = shortened(&name).trim_end();
    let says_something = name.chars().any(|character| character != '_');
    says_something.then(|| name.to_owned())
}

/// Replaces special characters: a slash ends a name, a backslash continues a line in a unit file, and the service
/// manager expands `${NAME}`. Control characters and characters that change the writing direction or are invisible
/// can make one name look like another.
fn harmless(character: char) -> char {
    let is_special = matches!(character, '/' | '\\' | '$');
    if is_special || is_deceptive(character) { '_' } else { character }
}

fn shortened(name: &str) -> &str {
    let mut escaped = 0;
    let fits = |(start, character): &(usize, char)| {
        let bytes = character.len_utf8();
        escaped += if character.is_ascii_alphanumeric() { 1 } else { 4 * bytes };
        escaped <= LONGEST_ESCAPED_NAME && start + bytes <= LONGEST
    };
    let end = name.char_indices().take_while(fits).last();
    end.map_or("", |(start, character)| &name[..start + character.len_utf8()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Device;

    #[test]
    fn hostile_text_becomes_a_safe_name() {
        let long = "ä".repeat(127);
        for (words, expected) in [
            ("data", Some("data")),
            ("My  Disk (1)", Some("My  Disk (1)")),
            ("../../etc", Some("_._.._etc")),
            ("a/b", Some("a_b")),
            (".", None),
            ("..", Some("_.")),
            (".hidden", Some("_hidden")),
            ("/", None),
            ("", None),
            (" \t\n ", None),
            ("  x  ", Some("x")),
            ("a\nWhat=/dev/sda", Some("a_What=_dev_sda")),
            ("a\\", Some("a_")),
            ("a\\x2db", Some("a_x2db")),
            ("a\u{1b}[31m", Some("a_[31m")),
            ("txt\u{202e}gpj", Some("txt_gpj")),
            ("a\u{2028}b", Some("a_b")),
            ("a\u{200b}b\u{feff}\u{e0041}", Some("a_b__")),
            ("\u{0}", None),
            ("100%n", Some("100%n")),
            ("${HOME}", Some("_{HOME}")),
            ("$$", None),
            ("'; reboot #", Some("'; reboot #")),
            (&long, Some(&long[..40])),
        ] {
            let name = safe_name(words.as_bytes());
            assert_eq!(name.as_deref(), expected, "{words:?}");
        }
        assert_eq!(safe_name(b"a\xffb").as_deref(), Some("a\u{fffd}b"));
        assert_eq!(safe_name(&[b'x'; 255]).map(|name| name.len()), Some(LONGEST));
    }

    #[test]
    fn the_label_is_taken_first_then_the_uuid_then_the_file() {
        let name = |label: &str, uuid: &str, file: &[u8]| {
            let file_system =
                FileSystem { label: label.to_owned(), uuid: uuid.to_owned(), ..FileSystem::default() };
            let device = Device { backing_file: file.to_vec(), ..Device::default() };
            of_volume(&file_system, &Snapshot::of_device(device))
        };
        assert_eq!(name("data", "1234", b"/home/a/x.iso"), "data");
        assert_eq!(name("", "1234", b"/home/a/x.iso"), "1234");
        assert_eq!(name("..", "1234", b"/home/a/x.iso"), "_.");
        assert_eq!(name("/", "\n", b"/home/a/x.iso"), "x.iso");
        assert_eq!(name("", "", b"/"), "image");
    }

    #[test]
    fn a_name_is_one_directory_and_bounded() {
        bolero::check!().with_type::<Vec<u8>>().for_each(|words| check(words));
        let hostile: Vec<char> = "./\\$ \u{202e}\u{200b}\n\0ä-%x".chars().collect();
        bolero::check!().with_type::<Vec<u8>>().for_each(|picks| {
            let words: String =
                picks.iter().map(|pick| hostile[usize::from(*pick) % hostile.len()]).collect();
            check(words.as_bytes());
        });
    }

    fn check(words: &[u8]) {
        let Some(name) = safe_name(words) else { return };
        assert!(!name.is_empty() && name.len() <= LONGEST);
        assert!(!name.starts_with('.'), "{name:?}");
        assert_eq!(name.trim(), name);
        assert!(!name.contains(['/', '\\', '$', '\n', '\0']), "{name:?}");
        assert!(!name.chars().any(is_deceptive));
        assert_eq!(safe_name(name.as_bytes()), Some(name), "a safe name stays as it is");
    }
}
