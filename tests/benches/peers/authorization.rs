//! `CheckAuthorization` alone: the part of an ordinary user's attach that is not loopd's.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use loopd_dbus::names::ACTION_ATTACH;
use zbus::{Connection, Variant};

const NAME: &str = "org.freedesktop.PolicyKit1";
const AUTHORITY: &str = "/org/freedesktop/PolicyKit1/Authority";
const INTERFACE: &str = "org.freedesktop.PolicyKit1.Authority";
const NO_FLAGS: u32 = 0;

/// Asks polkit about a client, as loopd does.
pub struct Authorization {
    connection: Connection,
    client: String,
}

impl Authorization {
    /// Asks over root's connection about the client that has the other one.
    pub fn new(connection: Connection, client: &Connection) -> Result<Self> {
        let client = client.unique_name().context("the client has no name")?.to_string();
        Ok(Self { connection, client })
    }

    /// Asks whether it may attach a file; returns how long the answer takes.
    pub async fn check(&self) -> Result<Duration> {
        let subject = ("system-bus-name", HashMap::from([("name", Variant::from(self.client.as_str()))]));
        let details = HashMap::from([("device", ""), ("file", "/image"), ("owner", "")]);
        let body = (subject, ACTION_ATTACH, details, NO_FLAGS, "");
        let start = Instant::now();
        let reply = self
            .connection
            .call_method(Some(NAME), AUTHORITY, Some(INTERFACE), "CheckAuthorization", &body)
            .await?;
        let time = start.elapsed();
        let (is_authorized, _, _): (bool, bool, HashMap<String, String>) = reply.body().deserialize()?;
        ensure!(is_authorized, "polkit refuses the attach");
        Ok(time)
    }
}
