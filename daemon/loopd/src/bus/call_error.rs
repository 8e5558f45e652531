//! Why a method call failed.

use std::error::Error as _;

use loopd_dbus::{Error, ErrorReply};

/// The error of a method call: the reply to the client, and the causes for the log.
#[derive(Debug)]
pub struct CallError {
    reply: Error,
    causes: Option<String>,
}

impl CallError {
    /// The text of the reply.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.reply.message
    }

    /// The errors that caused this one, outermost first; `None` if there are none.
    #[must_use]
    pub fn causes(&self) -> Option<&str> {
        self.causes.as_deref()
    }
}

impl From<Error> for CallError {
    fn from(reply: Error) -> Self {
        Self { reply, causes: None }
    }
}

impl From<loopd_engine::Error> for CallError {
    fn from(error: loopd_engine::Error) -> Self {
        let mut causes = Vec::new();
        let mut next = error.source();
        while let Some(cause) = next {
            causes.push(cause.to_string());
            next = cause.source();
        }
        let causes = (!causes.is_empty()).then(|| causes.join(": "));
        Self { reply: error.into(), causes }
    }
}

impl From<CallError> for ErrorReply {
    fn from(error: CallError) -> Self {
        error.reply.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_kept_for_the_log() {
        let cause = loopd_engine::Error::BackingFileHangs { number: 0 };
        let text = cause.to_string();
        let unknown =
            loopd_engine::Error::OverlapUnknown { file: "/x.img".to_owned(), source: Box::new(cause) };
        let error = CallError::from(unknown);
        assert_eq!(error.causes(), Some(text.as_str()));
        assert!(error.message().contains(&text));
        assert_eq!(CallError::from(loopd_engine::Error::AttachAbandoned).causes(), None);
    }
}
