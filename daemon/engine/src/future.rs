//! The futures of the traits through which the engine reaches the world.

use std::pin::Pin;

/// A call in progress, and its result.
///
/// All these traits return boxed futures: some of them are used as objects, which no other kind of future
/// allows, and any of their calls takes far longer than an allocation.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
