//! The service manager hears from the daemon for as long as the daemon answers.

use loopd_tests::Outcome;
use loopd_tests::polkit::Setup;
use loopd_tests::process::eventually;
use loopd_tests::service_manager::ServiceManager;
use loopd_tests::world::World;

loopd_tests::tests! {
    "watchdog";
    Setup::None => [fed_while_it_answers, silent_without_a_watchdog];
}

const FED: &str = "WATCHDOG=1";

async fn fed_while_it_answers(world: &mut World) -> Outcome {
    let manager = ServiceManager::start(&world.folder)?;
    let mut environment = manager.environment();
    environment.push(("WATCHDOG_USEC", "60000"));
    world.restart_daemon(&environment).await?;
    let fed_again = async |what: &str| {
        let before = manager.heard(FED);
        eventually(what, async || Ok(manager.heard(FED) > before + 3)).await
    };
    fed_again("it is fed").await?;
    // Without the bus the daemon cannot answer, and does not say that it can.
    world.bus().freeze(true)?;
    let mut before = manager.heard(FED);
    loop {
        tokio::time::sleep(std::time::Duration::from_millis(120)).await;
        let now = manager.heard(FED);
        if now == before {
            break;
        }
        // What was under way when the bus stopped.
        assert!(now <= before + 1, "it is fed although nothing can answer");
        before = now;
    }
    world.bus().freeze(false)?;
    fed_again("it is fed again").await
}

async fn silent_without_a_watchdog(world: &mut World) -> Outcome {
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_daemon(&manager.environment()).await?;
    eventually("it is told of the start", async || Ok(manager.heard("READY=1") == 1)).await?;
    world.end_daemon().await?;
    eventually("it is told of the end", async || Ok(manager.heard("STOPPING=1") > 0)).await?;
    assert_eq!(manager.heard(FED), 0);
    Ok(())
}
