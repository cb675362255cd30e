// Signing in with the token of the device, typed or from the address (#token=…).
import { get, request } from "./api.js";
import { connect } from "./connection.js";
import { set, tell } from "./store.js";
import { html, useId, useState } from "./vendor.js";

/** Take the token out of the address at once, so that it is in no history, bookmark or screenshot. */
export function tokenFromAddress() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) history.replaceState(null, "", location.pathname + location.search);
  return token;
}

/** Learn whether a token is needed, use one from the address, and connect. */
export async function open(token) {
  try {
    let session = await get("v1/session");
    if (token && session.token_needed && !session.signed_in) {
      await request("POST", "v1/session", { json: { token } });
      session = await get("v1/session");
    }
    set({ session });
    if (!session.token_needed || session.signed_in) connect();
  } catch (error) {
    set({ session: { token_needed: true, signed_in: false, ...(await get("v1/session").catch(() => null)) } });
    tell(error.message, "error");
  }
}

/** Ask for the token. */
export function SignIn() {
  const [token, setToken] = useState("");
  const [problem, setProblem] = useState("");
  const id = useId();
  const send = async (event) => {
    event.preventDefault();
    try {
      await request("POST", "v1/session", { json: { token: token.trim() } });
      set({ notice: null });
      await open(null);
    } catch (error) {
      setProblem(error.message);
    }
  };
  return html`
    <main class="signin">
      <form class="card" onSubmit=${send}>
        <img src="console/mark.svg" alt="" width="56" height="56" />
        <h1>Sign in</h1>
        <div class="field">
          <label for=${id}>Token</label>
          <input
            id=${id}
            type="password"
            autocomplete="current-password"
            value=${token}
            required
            aria-invalid=${problem ? "true" : null}
            aria-describedby="${id}-about"
            onInput=${(event) => setToken(event.target.value)}
          />
          <p id="${id}-about" class=${problem ? "problem" : "hint"} role=${problem ? "alert" : null}>
            ${problem || "The service printed it when it was started for the first time."}
          </p>
        </div>
        <button type="submit" class="primary large">Sign in</button>
      </form>
    </main>
  `;
}
