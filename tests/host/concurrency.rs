//! Many clients at once.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};

use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, DetachOptions};
use loopd_tests::Outcome;
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;

loopd_tests::tests! {
    "concurrency";
    Setup::None => [eight_clients_attach_and_detach, concurrent_calls_of_one_client];
}

const CLIENTS: usize = 8;
const ROUNDS: usize = 25;

async fn eight_clients_attach_and_detach(fixture: &mut Fixture) -> Outcome {
    let live = Arc::new(Mutex::new(HashSet::new()));
    let mut clients = Vec::new();
    for client in 0..CLIENTS {
        let image = Image::sparse(&fixture.directory, format!("image-{client}"), MIB)?;
        let connection = fixture.connect().await?;
        let live = Arc::clone(&live);
        clients.push(tokio::spawn(async move {
            let manager = Manager::new(&connection, Interaction::Forbidden).await?;
            for round in 0..ROUNDS {
                let file = image.open()?;
                let options = AttachOptions { wait: round % 2 == 0, ..AttachOptions::default() };
                let (_, node) = manager.setup_loop(file.as_fd(), &options).await?;
                anyhow::ensure!(live.lock().unwrap().insert(node.clone()), "{node} was given out twice");
                anyhow::ensure!(live.lock().unwrap().remove(&node), "{node} is not ours");
                manager.detach(&node, DetachOptions::default()).await?;
            }
            anyhow::Ok(())
        }));
    }
    for client in clients {
        client.await??;
    }
    assert!(fixture.list(false).await?.is_empty());
    fixture.assert_no_leak().await
}

async fn concurrent_calls_of_one_client(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let files: Vec<_> = (0..CLIENTS).map(|_| image.open()).collect::<Result<_, _>>()?;
    let options = AttachOptions::default();
    let calls = files.iter().map(|file| fixture.manager.setup_loop(file.as_fd(), &options));
    let nodes: HashSet<String> =
        futures_util::future::try_join_all(calls).await?.into_iter().map(|(_, node)| node).collect();
    assert_eq!(nodes.len(), CLIENTS);
    let calls = nodes.iter().map(|node| fixture.manager.detach(node, DetachOptions::default()));
    futures_util::future::try_join_all(calls).await?;
    assert!(fixture.list(false).await?.is_empty());
    Ok(())
}
