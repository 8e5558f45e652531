//! loopd on the system bus: the connection, its objects, its errors and the polkit agent.

pub mod agent;
pub mod attachment;
pub mod cleartext;
pub mod connection;
pub mod error;
#[cfg(test)]
pub mod example;
#[cfg(test)]
pub mod fake;
pub mod objects;
pub mod partition;
