//! Changes each device of a target, for the commands `resize`, `set` and `rescan`.

use std::ffi::OsStr;

use loopd_dbus::proxy::{Attachment, Interaction};

use crate::advice::Operation;
use crate::bus::agent::with_agent;
use crate::bus::connection::Bus;
use crate::image::busy_device;
use crate::image::target::Target;
use crate::report::report;

/// Applies the change to each attachment of the target; a failure does not stop the others.
pub async fn change_each(
    target: &OsStr,
    interaction: Interaction,
    change: impl AsyncFn(&Attachment) -> anyhow::Result<()>,
) -> anyhow::Result<u8> {
    let bus = Bus::open(interaction).await?;
    let found = Target::resolve(target).find(&bus.manager).await?;
    with_agent(interaction, async {
        let mut results = Vec::new();
        for info in &found {
            results.push(match change(&bus.attachment(&info.path).await?).await {
                Ok(()) => Ok(()),
                Err(error) => Err(busy_device::explained(&bus, error, info.attachment.number).await),
            });
        }
        if results.len() == 1 {
            return results.remove(0).map(|()| 0);
        }
        Ok(report_all(&results))
    })
    .await
}

/// Reports the failures; returns the exit status for all results.
pub fn report_all(results: &[anyhow::Result<()>]) -> u8 {
    let failures = results.iter().filter_map(|result| result.as_ref().err());
    let statuses: Vec<u8> = failures.map(|error| report(error, Operation::Other)).collect();
    u8::from(!statuses.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_fails_the_command() {
        assert_eq!(report_all(&[Ok(()), Ok(())]), 0);
        assert_eq!(report_all(&[Ok(()), Err(anyhow::anyhow!("a test's failure"))]), 1);
    }
}
