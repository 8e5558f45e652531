//! The passphrase or key of an encrypted volume: read from a file, or asked for on the terminal or in a window.

#[cfg(test)]
mod asking;
mod core_dump;
pub mod file;
mod pinentry;
pub mod pipe;
pub mod secret;
pub mod source;
mod terminal;
