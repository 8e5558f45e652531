//! Where the passphrase comes from, and how often it is asked for.

use loopd_dbus::proxy::Interaction;
use loopd_dbus::{Error, ErrorKind};

use super::file::{self, Content};
use super::pinentry::{self, Texts};
use super::secret::Secret;
use super::terminal;
use crate::cli::PassphraseArgs;
use crate::message::message;

/// How often a person may try.
const TRIES: u32 = 3;
/// The options that replace a prompt.
const OPTIONS: &str = "use --passphrase-file or --key-file";

/// Where the passphrase comes from.
pub enum Source {
    /// A file, which has been read.
    File(Secret),
    /// The user.
    User(Interaction),
}

/// The result of one try.
pub enum Try<T> {
    /// It succeeded.
    Done(T),
    /// The passphrase is wrong.
    Wrong(anyhow::Error),
}

impl Source {
    /// The file that the options name, whose contents are read now, or the user.
    ///
    /// # Errors
    /// There is more than one file, or it cannot be read.
    pub fn of(args: &PassphraseArgs, interaction: Interaction) -> anyhow::Result<Self> {
        let (path, content) = match (&args.passphrase_file, args.key_files.as_slice()) {
            (None, []) => return Ok(Self::User(interaction)),
            (Some(path), []) => (path, Content::Passphrase),
            (None, [path]) => {
                (path, Content::Key { offset: args.key_offset.unwrap_or_default(), size: args.key_size })
            }
            _ => {
                let text =
                    "--passphrase-file or one --key-file is used; only VeraCrypt and TrueCrypt combine them";
                return Err(Error::new(ErrorKind::InvalidArgs, text).into());
            }
        };
        file::read(path, content).map(Self::File)
    }

    /// Calls `attempt` with the passphrase of `subject`, such as `/home/a/x.img`. A person has three tries, a file one.
    ///
    /// # Errors
    /// The user cannot be asked or canceled, the last try was wrong, or `attempt` failed.
    pub async fn attempt<T>(
        &self,
        subject: &str,
        attempt: impl AsyncFn(&Secret) -> anyhow::Result<Try<T>>,
    ) -> anyhow::Result<T> {
        let interaction = match self {
            Self::File(secret) => return attempt(secret).await?.done(),
            Self::User(interaction) => *interaction,
        };
        let mut wrong = None;
        for _ in 1..TRIES {
            let secret = ask(subject, "", interaction, wrong.as_deref()).await?;
            match attempt(&secret).await? {
                Try::Done(result) => return Ok(result),
                Try::Wrong(error) => wrong = Some(format!("{error:#}")),
            }
        }
        let secret = ask(subject, "", interaction, wrong.as_deref()).await?;
        attempt(&secret).await?.done()
    }

    /// The new passphrase of `subject`. A person has to type it twice, and may try three times.
    ///
    /// # Errors
    /// The user cannot be asked or canceled, or never typed it twice.
    pub async fn choose(self, subject: &str) -> anyhow::Result<Secret> {
        let interaction = match self {
            Self::File(secret) => return Ok(secret),
            Self::User(interaction) => interaction,
        };
        let mut differ = None;
        for _ in 0..TRIES {
            let secret = ask(subject, "new ", interaction, differ).await?;
            if ask(subject, "same ", interaction, None).await?.bytes() == secret.bytes() {
                return Ok(secret);
            }
            differ = Some("the two passphrases differ");
        }
        anyhow::bail!("the two passphrases differ")
    }
}

impl<T> Try<T> {
    fn done(self) -> anyhow::Result<T> {
        match self {
            Self::Done(result) => Ok(result),
            Self::Wrong(error) => Err(error),
        }
    }
}

/// Asks on the terminal; without one in a window. `wrong`: what was wrong with the last passphrase.
async fn ask(
    subject: &str,
    which: &str,
    interaction: Interaction,
    wrong: Option<&str>,
) -> anyhow::Result<Secret> {
    anyhow::ensure!(
        interaction == Interaction::Allowed,
        "{subject} needs a passphrase, and --no-ask-password forbids a prompt; {OPTIONS}"
    );
    if let Some(terminal) = terminal::open() {
        wrong.into_iter().for_each(message);
        return terminal::ask(terminal, &prompt(subject, which)).await;
    }
    anyhow::ensure!(
        pinentry::has_display(),
        "{subject} needs a passphrase, and there is neither a terminal nor a display to ask for it; {OPTIONS}"
    );
    let description = format!("Enter the {which}passphrase for {subject}.");
    pinentry::ask(Texts { description: &description, prompt: "Passphrase:", error: wrong }).await
}

fn prompt(subject: &str, which: &str) -> String {
    match which.chars().next() {
        Some(first) => {
            format!("{}{}passphrase for {subject}: ", first.to_uppercase(), &which[first.len_utf8()..])
        }
        None => format!("Passphrase for {subject}: "),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::passphrase::asking::{Asking, is_child};

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    fn file(bytes: &[u8]) -> Source {
        let mut secret = Secret::new();
        secret.append(bytes).unwrap();
        Source::File(secret)
    }

    #[test]
    fn a_file_has_one_try() {
        let tries = Cell::new(0);
        let attempt = async |secret: &Secret| {
            tries.set(tries.get() + 1);
            assert_eq!(secret.bytes(), b"wrong");
            Ok(Try::<()>::Wrong(anyhow::anyhow!("it is wrong")))
        };
        let error = block_on(file(b"wrong").attempt("x.img", attempt)).unwrap_err();
        assert_eq!((error.to_string().as_str(), tries.get()), ("it is wrong", 1));
        assert_eq!(block_on(file(b"new").choose("x.img")).unwrap().bytes(), b"new");
    }

    /// The program of the next tests: it accepts the passphrase "right", and chooses a new one after that.
    #[test]
    fn child() {
        if !is_child() {
            return;
        }
        let source = Source::User(Interaction::Allowed);
        let attempt = async |secret: &Secret| match secret.bytes() {
            b"right" => Ok(Try::Done(())),
            _ => Ok(Try::Wrong(anyhow::anyhow!("it is wrong"))),
        };
        block_on(async {
            println!(
                "unlocked: {:?}",
                source.attempt("x.img", attempt).await.map_err(|error| error.to_string())
            );
            let chosen = source.choose("x.img").await.map(|secret| secret.bytes().len());
            println!("chosen: {:?}", chosen.map_err(|error| error.to_string()));
        });
    }

    /// Answers the prompts, each with its start, and returns what the program prints.
    fn answer(prompts: &[(&str, &str)]) -> String {
        let asking = Asking::start("passphrase::source::tests::child");
        for (prompt, answer) in prompts {
            asking.expect(&format!("{prompt} for x.img: "));
            asking.type_text(&format!("{answer}\n"));
        }
        asking.output()
    }

    #[test]
    fn a_person_has_three_tries_and_types_a_new_passphrase_twice() {
        let (old, new, same) = ("Passphrase", "New passphrase", "Same passphrase");
        let output = answer(&[
            (old, "wrong"),
            (old, "wrong"),
            (old, "right"),
            (new, "a"),
            (same, "b"),
            (new, "abc"),
            (same, "abc"),
        ]);
        assert!(output.contains("unlocked: Ok(())") && output.contains("chosen: Ok(3)"), "{output}");
        let differ = [(new, "a"), (same, "b")];
        let output = answer(&[&[(old, "wrong"); 3][..], &differ, &differ, &differ].concat());
        let expected = "chosen: Err(\"the two passphrases differ\")";
        assert!(output.contains("unlocked: Err(\"it is wrong\")") && output.contains(expected), "{output}");
    }

    #[test]
    fn without_a_prompt_the_options_are_named() {
        let source = Source::User(Interaction::Forbidden);
        let error = block_on(source.attempt("x.img", async |_| Ok(Try::Done(())))).unwrap_err().to_string();
        let expected = "x.img needs a passphrase, and --no-ask-password forbids a prompt; use --passphrase-file or --key-file";
        assert_eq!(error, expected);
        assert_eq!(block_on(source.choose("x.img")).err().unwrap().to_string(), expected);
    }

    #[test]
    fn prompts_say_which_passphrase_is_meant() {
        assert_eq!(prompt("x.img", ""), "Passphrase for x.img: ");
        assert_eq!(prompt("x.img", "new "), "New passphrase for x.img: ");
    }
}
