//! Binds a file to a free loop device, or to a wanted one.

mod configure;
mod number;
mod refusal;
mod sweep;
mod wanted;

pub use number::bind;
