//! The contract's errors on the bus.

use loopd_common::{Error, ErrorKind};
use zbus::message::{Header, Message};
use zbus::names::ErrorName;

/// Reads the contract's error from a failed call; `None` if the bus itself failed.
#[must_use]
pub fn from_call(error: &zbus::Error) -> Option<Error> {
    match error {
        zbus::Error::MethodError(name, message, _) => {
            let kind = ErrorKind::from_name(name.as_str())?;
            Some(Error::new(kind, message.clone().unwrap_or_default()))
        }
        zbus::Error::FDO(standard) => {
            let kind = ErrorKind::from_name(zbus::DBusError::name(&**standard).as_str())?;
            Some(Error::new(kind, zbus::DBusError::description(&**standard).unwrap_or_default()))
        }
        _ => None,
    }
}

/// An error of the contract as the reply of a method.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct ErrorReply(#[from] pub Error);

impl zbus::DBusError for ErrorReply {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
        Message::error(call, self.name()).build(&(&self.0.message,))
    }

    fn name(&self) -> ErrorName<'_> {
        ErrorName::from_static_str_unchecked(self.0.kind.name())
    }

    fn description(&self) -> Option<&str> {
        Some(&self.0.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_valid_on_the_bus() {
        for kind in ErrorKind::ALL {
            ErrorName::try_from(kind.name()).unwrap();
        }
    }
}
