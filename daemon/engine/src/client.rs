//! Clients, and the callers of operations.

/// A client: the unique name of its bus connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientId(pub String);

impl std::fmt::Display for ClientId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The caller of an operation.
pub trait Caller: Send + Sync {
    /// Its connection.
    fn client(&self) -> &ClientId;
    /// Its uid.
    fn uid(&self) -> u32;
    /// Whether it has disconnected. A caller is watched during the whole call.
    fn is_disconnected(&self) -> bool;
    /// Waits until it disconnects.
    fn disconnected(&self) -> impl Future<Output = ()> + Send;
}
