//! `loopd-floor`: a service with one method that does nothing. `make bench` shows its size and memory as the floor of loopd's:
//! the libraries alone. `loopd-floor connect` connects to the bus and exits: the floor of a command.

/// The interface.
struct Floor;

#[zbus::interface(name = "org.loopd1.Floor")]
impl Floor {
    async fn rest(&self) {}
}

fn main() -> zbus::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if std::env::args().nth(1).as_deref() == Some("connect") {
        return runtime.block_on(zbus::Connection::system()).map(drop);
    }
    runtime.block_on(async {
        let connection = zbus::connection::Builder::system().serve_at("/", Floor).build().await?;
        let names = zbus::fdo::DBusProxy::new(&connection).await?;
        names.get_id().await?;
        // The caller waits for this line.
        println!("ready");
        std::future::pending().await
    })
}
