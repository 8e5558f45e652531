//! Clients, and the callers of operations.

/// A client: the unique name of its bus connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientId(pub String);

impl std::fmt::Display for ClientId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whoever asked, as far as the engine has to know.
pub trait Caller: Send + Sync {
    /// Its connection.
    fn client(&self) -> &ClientId;
    /// Its uid.
    fn uid(&self) -> u32;
    /// Whether it has vanished. Whoever calls is watched from before until after the call.
    fn is_disconnected(&self) -> bool;
    /// Resolves when it vanishes.
    fn disconnected(&self) -> impl Future<Output = ()> + Send;
}
