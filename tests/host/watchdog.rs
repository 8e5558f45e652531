//! The daemon notifies the watchdog while it answers.

use loopd_tests::Outcome;
use loopd_tests::fixture::Fixture;
use loopd_tests::polkit::Setup;
use loopd_tests::process::eventually;
use loopd_tests::service_manager::ServiceManager;

loopd_tests::tests! {
    "watchdog";
    Setup::None => [watchdog_is_notified_while_the_bus_answers, no_notification_without_a_watchdog];
}

const FED: &str = "WATCHDOG=1";

async fn watchdog_is_notified_while_the_bus_answers(fixture: &mut Fixture) -> Outcome {
    let manager = ServiceManager::start(&fixture.directory)?;
    let mut environment = manager.environment();
    environment.push(("WATCHDOG_USEC", "60000"));
    fixture.restart_daemon(&environment).await?;
    let fed_again = async |what: &str| {
        let before = manager.heard(FED);
        eventually(what, async || Ok(manager.heard(FED) > before + 3)).await
    };
    fed_again("it is fed").await?;
    // Without the bus the daemon cannot answer, so it does not notify.
    fixture.bus().freeze(true)?;
    let mut before = manager.heard(FED);
    loop {
        // Four times the interval of the notifications.
        tokio::time::sleep(std::time::Duration::from_millis(120)).await;
        let now = manager.heard(FED);
        if now == before {
            break;
        }
        // A notification that was in progress when the bus stopped.
        assert!(now <= before + 1, "it is fed although nothing can answer");
        before = now;
    }
    fixture.bus().freeze(false)?;
    fed_again("it is fed again").await
}

async fn no_notification_without_a_watchdog(fixture: &mut Fixture) -> Outcome {
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_daemon(&manager.environment()).await?;
    eventually("the start is notified", async || Ok(manager.heard("READY=1") == 1)).await?;
    fixture.end_daemon().await?;
    eventually("the end is notified", async || Ok(manager.heard("STOPPING=1") > 0)).await?;
    assert_eq!(manager.heard(FED), 0);
    Ok(())
}
